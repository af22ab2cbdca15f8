"""Adapters: what is learned for a task, in a model and in files, without the frozen backbone.

The format of the files is described in ``vapt_fast.adapters.file``.
"""

from .checks import backbone_fingerprint, fingerprint
from .file import CONFIG_NAME, WEIGHTS_NAME, AdapterError, AdapterNotFoundError
from .hub import push
from .loading import build, load, read_config
from .module import Adapter, trainable_summary
from .saving import save

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterError",
    "AdapterNotFoundError",
    "backbone_fingerprint",
    "build",
    "fingerprint",
    "load",
    "push",
    "read_config",
    "save",
    "trainable_summary",
]
