"""Visual Adaptive Prompt Tuning (VAPT, arXiv 2501.18936) for frozen timm Vision Transformers."""

from . import explain, functional
from . import registry as registry  # its import gives timm the names vapt_*
from ._version import __version__
from .adapters import AdapterError
from .adapters.stack import AdapterStack
from .config import PromptConfig
from .cuda_graphs import CudaGraphError, use_cuda_graphs
from .model import AdaptiveViT
from .official import from_official, to_official
from .ops.backend import BackendUnavailableError, use_backend

__all__ = [
    "AdapterError",
    "AdapterStack",
    "AdaptiveViT",
    "BackendUnavailableError",
    "CudaGraphError",
    "PromptConfig",
    "__version__",
    "explain",
    "from_official",
    "functional",
    "to_official",
    "use_backend",
    "use_cuda_graphs",
]
