"""The frozen Linears of a backbone, in their own precision or with products in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import is_ordinary, register_by_token
from ..ops.fp8_linear import Quantised, fp8_linear, quantise
from ..ops.linear import linear

__all__ = ["LINEARS", "Fp8GradientsLinear", "Fp8Linear", "Weights"]


class Fp8Linear(nn.Linear):
    """An nn.Linear whose product is computed in e4m3, see ``vapt_fast.ops.fp8_linear``.

    Its parameters are those of an nn.Linear; they are quantised in each call.
    """

    fp8_gradients: ClassVar[bool] = False

    def forward(self, input: Tensor) -> Tensor:
        """Return the product (..., out_features) of ``input`` (..., in_features).

        A weight of another class (quantised by another library, sharded) is multiplied as that does it.
        """
        if not is_ordinary(self.weight):
            return F.linear(input, self.weight, self.bias)
        return Weights(self.weight, self.bias, True, self.fp8_gradients)(input)


class Fp8GradientsLinear(Fp8Linear):
    """An Fp8Linear that computes the gradient of its input in e4m3 too."""

    fp8_gradients = True


LINEARS: dict[str | None, type[nn.Linear]] = {
    None: nn.Linear,
    "fp8": Fp8Linear,
    "fp8-gradients": Fp8GradientsLinear,
}
"""The class of a Linear by its precision; None for that of its weights."""

register_by_token(*LINEARS.values())


@dataclass
class Weights:
    """The weight (N, K) and the bias (N,) of a Linear, to be used in one call.

    Attributes:
        weight, bias: as they are.
        fp8: whether products are computed in e4m3.
        fp8_gradients: whether gradients of what they are multiplied with are, too.
        quantised: the weight in e4m3, once it was needed.
        whole, first: the weight of which this one is the rows from ``first`` on; None: of none.
    """

    weight: Tensor
    bias: Tensor | None
    fp8: bool = False
    fp8_gradients: bool = False
    quantised: Quantised | None = None
    whole: Tensor | None = None
    first: int = 0

    @classmethod
    def of(cls, linear: Any) -> Weights:
        """Return those of a plain module of one of ``LINEARS``, or of a replica, which has no parameters."""
        own = linear._parameters  # a replica without bias has that alone
        weight, bias = (own["weight"], own["bias"]) if "weight" in own else (linear.weight, linear.bias)
        fp8 = isinstance(linear, Fp8Linear)
        return cls(weight, bias, fp8, fp8 and linear.fp8_gradients)

    def __call__(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """Return x @ weight.T + bias, or with the exact GELU of x for x."""
        if not self.fp8:
            return linear(F.gelu(x) if gelu else x, self.weight, self.bias)
        if self.quantised is None:
            self.quantised = quantise(self.weight)
        options: dict[str, Any] = {"gelu": gelu, "fp8_gradients": self.fp8_gradients}
        options |= {"whole": self.whole, "first": self.first}
        return fp8_linear(x, self.weight, self.bias, self.quantised, **options)

    def split(self, at: int) -> tuple[Weights, Weights]:
        """Return the weights of the first ``at`` outputs, and of the others."""
        parts = (slice(None, at), slice(at, None))
        first, last = (
            Weights(
                self.weight[part],
                None if self.bias is None else self.bias[part],
                self.fp8,
                self.fp8_gradients,
                None if self.quantised is None else Quantised(*(t[part] for t in self.quantised)),
                self.weight if self.fp8 else None,
                part.start or 0,
            )
            for part in parts
        )
        return first, last
