"""CUDA graphs: the whole forward pass, and the whole backward pass, as one launch each.

The host needs longer to launch a thousand kernels than a GPU to run them. So a call that comes again and
again
is captured: ``graphs`` decides which, ``state`` tells when a graph is stale, ``captured`` is the graph as a
function with a gradient, ``recorder`` is CUDA. What can't be captured runs as it is.
"""

from .choice import ENVIRONMENT_VARIABLE, CudaGraphError, check_choice, choice, use_cuda_graphs
from .graphs import Graphs

__all__ = ["ENVIRONMENT_VARIABLE", "CudaGraphError", "Graphs", "check_choice", "choice", "use_cuda_graphs"]
