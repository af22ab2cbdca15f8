"""The MLP of a frozen block."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_float, check_one_dtype, check_same_device, check_shape
from ._implementation import run

__all__ = ["mlp"]


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    backend: str | None = None,
) -> Tensor:
    """fc2(gelu(fc1(x))), with the exact GELU, h * (1 + erf(h / sqrt(2))) / 2.

    Args:
        x: (B, T, C), tokens as fc1 reads them (normalised).
        fc1_weight, fc1_bias: (D, C) and (D,), or None without bias.
        fc2_weight, fc2_bias: (E, D) and (E,), or None without bias; E is C as a rule. All tensors are of one
            floating dtype, unless autocast casts them.
        backend: "auto", "torch" or "triton"; None for the current one, see use_backend.

    Returns:
        (B, T, E) in ``x``'s dtype, or in that of autocast; sums and GELU are computed in float32 at least.
        Differentiable in all tensors; the Triton kernels, whose backward is written by hand, only once and
        only in ``x``: where gradients are on, no other tensor may require one there.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape, dtype or device.
        BackendUnavailableError: the backend can't run here, or not with these arguments.
    """
    check_shape("x", x, "(B, T, C)", None, None, None)
    check_shape("fc1_weight", fc1_weight, "(D, C)", None, x.shape[-1])
    hidden = fc1_weight.shape[0]
    check_shape("fc2_weight", fc2_weight, "(E, D)", None, hidden)
    if fc1_bias is not None:
        check_shape("fc1_bias", fc1_bias, "(D,)", hidden)
    if fc2_bias is not None:
        check_shape("fc2_bias", fc2_bias, "(E,)", fc2_weight.shape[0])
    tensors = {
        "x": x,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    check_float(**tensors)
    check_same_device(**tensors)
    check_one_dtype(**tensors)
    return run("mlp", backend, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
