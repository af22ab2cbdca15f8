"""Adapters: what is learned for a task, in a model and in files, without the frozen backbone.

The format of the files is described in ``vapt_fast.adapters.file``.
"""

from .checks import backbone_fingerprint, fingerprint
from .file import CONFIG_NAME, WEIGHTS_NAME, AdapterError, AdapterNotFoundError
from .loading import build, load, read_config
from .merging import weighted_state
from .module import BASE, Adapter, MissingHead, check_name, find, trainable_summary
from .saving import save

__all__ = [
    "BASE",
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterError",
    "AdapterNotFoundError",
    "MissingHead",
    "backbone_fingerprint",
    "build",
    "check_name",
    "find",
    "fingerprint",
    "load",
    "read_config",
    "save",
    "trainable_summary",
    "weighted_state",
]
