"""fp8_linear: products with frozen weights in FP8."""

from .op import MULTIPLE as MULTIPLE
from .op import Quantised as Quantised
from .op import fp8_linear as fp8_linear
from .op import quantise as quantise
