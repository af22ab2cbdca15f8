"""The standard block of timm's ViTs in parts: x + ls1 * attention(norm1(x)), then x + ls2 * mlp(norm2(x)).

A block is taken apart only where that can't be told from calling it. Otherwise, and where it is of another
kind, it is called as it is; ``fallback_reason`` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from timm.layers import GELU, DropPath, LayerNorm, LayerScale, Mlp
from torch import Tensor, nn

from ..modules import BY_TOKEN, Once, has_global_hooks, is_patched, is_plain, token_mixing_reason
from .base import FAMILIES
from .linears import LINEARS, Weights

__all__ = ["StandardBlock", "fallback_reason", "kind_reason", "split_block", "standard_block"]

NOT_CALLED = (nn.Identity, nn.Dropout, DropPath)  # when they are off
READABLE_LINEARS = tuple(LINEARS.values())


def kind_reason(block: Any) -> str | None:
    """Return why ``block`` is of a kind that can't be taken apart; None if it is of one that can."""
    if not any(type(block) in family.blocks for family in FAMILIES):
        return f"it is a {type(block).__name__}, not one of timm's standard blocks"
    if not any(type(block.attn) in family.attentions for family in FAMILIES):
        return f"attn is a {type(block.attn).__name__}, not one of timm's standard attentions"
    return None


def fallback_reason(block: Any) -> str | None:
    """Return why ``block`` must be called as it is; None if it can be taken apart.

    Only modules that are known to act on each token by itself, as a Linear does, are called with the tokens
    that are needed. What others put in their place or hooked to them gets the whole sequence.
    """
    kind = kind_reason(block)
    if kind is not None:
        return kind
    attn = block.attn
    if getattr(attn, "gate", None) is not None:
        return "attn has a gate"
    if is_patched(type(attn)):
        return "the forward of its attention was replaced"
    for name, module in (("", block), ("attn", attn)):
        if not is_plain(module, type(module)):
            return f"{name or 'it'} has hooks, another forward, or weights of another kind"
    for name in ("drop_path1", "drop_path2", "attn.attn_drop"):
        if not is_plain(block.get_submodule(name), *NOT_CALLED):
            return f"{name} is not timm's"
    if has_global_hooks():
        return "there are hooks on all modules"
    # timm's fused attention asks for the attention's own mode, not for its dropout's.
    if attn.training and attn.attn_drop.p > 0:
        return "attn drops"
    for parent, prefix in ((block, ""), (attn, "attn.")):
        for name, module in parent.named_children():
            reason = None if module is attn else token_mixing_reason(module, prefix + name)
            if reason is not None:
                return reason
    if getattr(attn, "q_bias", None) is not None:
        if not is_plain(attn.qkv, nn.Linear):
            return "attn.qkv is no plain Linear, whose weight timm's attention reads"
        if attn.qkv.bias is not None:
            return "attn.qkv has a bias beside q_bias"
    if hasattr(attn, "attn_dim") and attn.attn_dim != attn.num_heads * attn.head_dim:
        return "attn has not as many heads as it has channels for"
    return None


@dataclass  # a frozen one takes longer to make
class StandardBlock:
    """The parts of one block, as they are during one call.

    C channels; h heads of d channels; g heads of keys and values.

    Attributes:
        block: timm's block.
        attn: its attention.
        norm1, norm2: the LayerNorms, None where they have to be called.
        qkv: weight ((h + 2g) * d, C) and bias of the joint projection; None where it has to be called, or
            where there are three.
        proj: weight and bias of the attention's last projection; None where it has to be called.
        bias: (1, h, T, T), added to the scores by this block itself, or None.
        gelu_mlp: the weights of fc1 and fc2 if the MLP is fc2(gelu(fc1(x))) with the exact GELU and
            nothing more; None: it has to be called.
        layer_scales: where each of the two LayerScales is, see ``_layer_scale``.
    """

    block: Any
    attn: Any
    norm1: nn.LayerNorm | None
    norm2: nn.LayerNorm | None
    qkv: Weights | None
    proj: Weights | None
    bias: Tensor | None
    gelu_mlp: tuple[Weights, Weights] | None
    layer_scales: tuple[str, str]

    def called(self) -> list[str]:
        """Names of the modules that are called though a rewrite or a kernel could use their weights."""
        attn = self.attn
        read: dict[str, object] = {"norm1": self.norm1, "norm2": self.norm2, "mlp": self.gelu_mlp}
        if attn.qkv is not None:
            read["attn.qkv"] = self.qkv
        return [name for name, weights in read.items() if weights is None]

    @property
    def num_heads(self) -> int:
        """The number of heads of the queries, h."""
        return cast(int, self.attn.num_heads)

    @property
    def num_kv_heads(self) -> int:
        """The number of heads of the keys and values, g."""
        return cast(int, getattr(self.attn, "num_kv_heads", self.attn.num_heads))

    @property
    def q_norm(self) -> nn.Module | None:
        """The norm of each query; None where there is none."""
        return _unless_identity(self.attn, "q_norm")

    @property
    def k_norm(self) -> nn.Module | None:
        """The norm of each key; None where there is none."""
        return _unless_identity(self.attn, "k_norm")

    @property
    def kv_dim(self) -> int:
        """The number of channels of the keys, and of the values: g * d."""
        return self.attn.proj.in_features // self.num_heads * self.num_kv_heads

    def softmax_scale(self, head_dim: int) -> float:
        """The factor of the scores. PyTorch's attention, where timm calls that, has its own."""
        scale: float = self.attn.scale
        return int(head_dim) ** -0.5 if self.attn.fused_attn else scale  # torch.jit.trace has tensors

    def sections(self, width: int) -> tuple[int, int, int]:
        """Widths of queries, keys and values in a joint projection of ``width`` rows."""
        keys = width // (self.num_heads + 2 * self.num_kv_heads) * self.num_kv_heads
        return width - 2 * keys, keys, keys

    def q_and_kv(self) -> tuple[Weights, Weights]:
        """The weights of the queries in ``qkv``, and of the keys and values."""
        qkv = cast(Weights, self.qkv)
        return qkv.split(self.sections(qkv.weight.shape[0])[0])

    def project(
        self, tokens: Tensor, prompts: Tensor, num_rows: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries of the first ``num_rows`` tokens (None: all), then keys and values of tokens and prompts.

        Args:
            tokens: (B, T, C), normalised.
            prompts: (B or 1, P, C), normalised.
            num_rows: how many tokens need a query.

        Returns:
            q (B, rows, h, d); k, v (B, T, g, d); prompt_k, prompt_v (B or 1, P, g, d).
        """
        attn, rows = self.attn, tokens[:, :num_rows]
        if attn.qkv is None:
            q, k, v = attn.q_proj(rows), attn.k_proj(tokens), attn.v_proj(tokens)
            prompt_k, prompt_v = (
                projection(prompts) if prompts.shape[1] else x[:1, :0]
                for projection, x in ((attn.k_proj, k), (attn.v_proj, v))
            )
        else:
            if self.qkv is None:
                qkv = attn.qkv(tokens)
                prompt_qkv = attn.qkv(prompts) if prompts.shape[1] else qkv[:1, :0]
                q, k, v = qkv.split(self.sections(qkv.shape[-1]), dim=-1)
                q = q[:, :num_rows]
                prompt_kv = prompt_qkv[..., q.shape[-1] :]
            else:
                if num_rows is None:
                    qkv = self.qkv(tokens)
                    q, k, v = qkv.split(self.sections(qkv.shape[-1]), dim=-1)
                    of_kv = self.q_and_kv()[1]
                else:
                    of_q, of_kv = self.q_and_kv()
                    q = of_q(rows)
                    k, v = of_kv(tokens).chunk(2, dim=-1)
                prompt_kv = of_kv(prompts)
            prompt_k, prompt_v = prompt_kv.chunk(2, dim=-1)
        heads = self.num_kv_heads
        k, v, prompt_k, prompt_v = (torch.unflatten(x, -1, (heads, -1)) for x in (k, v, prompt_k, prompt_v))
        return torch.unflatten(q, -1, (self.num_heads, -1)), k, v, prompt_k, prompt_v

    def finish_attention(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """The attention branch of what the heads give (B, rows, h * d), as ``scaled`` returns it."""
        norm = _unless_identity(self.attn, "norm")
        out = out if norm is None else norm(out)
        if self.proj is None:
            return self.scaled(self.attn.proj_drop(self.attn.proj(out)), 1)
        return self.scaled(self.proj(out), 1)

    def scaled(self, branch: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
        """The branch (B, rows, C) after LayerScale 1 or 2: a tensor and a factor (C,) of it, None for 1."""
        how = self.layer_scales[number - 1]
        if how == "none":
            return branch, None
        if how == "gamma":
            return branch, getattr(self.block, f"gamma_{number}")
        layer_scale = getattr(self.block, f"ls{number}")
        return (branch, layer_scale.gamma) if how == "plain" else (layer_scale(branch), None)


class _Readable(NamedTuple):
    """Which weights of a standard block may be read instead of calling their modules."""

    norm1: bool
    norm2: bool
    qkv: bool
    proj: bool
    gelu_mlp: bool
    layer_scales: tuple[str, str]
    separate_bias: bool
    score_bias: bool


def _readable(block: Any) -> _Readable:
    attn = block.attn
    return _Readable(
        norm1=_is_affine(block.norm1),
        norm2=_is_affine(block.norm2),
        qkv=attn.qkv is not None and is_plain(attn.qkv, *READABLE_LINEARS),
        proj=is_plain(attn.proj, *READABLE_LINEARS) and is_plain(attn.proj_drop, nn.Dropout, nn.Identity),
        gelu_mlp=_is_gelu_mlp(block.mlp),
        layer_scales=(_layer_scale(block, 1), _layer_scale(block, 2)),
        separate_bias=getattr(attn, "q_bias", None) is not None,
        score_bias=hasattr(attn, "score_bias"),
    )


def _numbers(block: Any) -> list[Any]:
    """Return what else ``fallback_reason`` and ``_readable`` read, how many classes are known among it."""
    attn, act = getattr(block, "attn", None), getattr(getattr(block, "mlp", None), "act", None)
    own: dict[str, Any] = {} if attn is None else attn.__dict__
    approximate = None if act is None else act.__dict__.get("approximate")
    numbers = map(own.get, ("gate", "q_bias", "attn_dim", "num_heads", "head_dim"))
    return [*numbers, approximate, len(BY_TOKEN), len(FAMILIES)]


_ask = Once(lambda block: _readable(block) if fallback_reason(block) is None else None, _numbers)


def standard_block(block: Any) -> StandardBlock | None:
    """``block`` in parts, or None where ``fallback_reason`` has a reason to call it as it is."""
    if has_global_hooks():
        return None if fallback_reason(block) is not None else _take_apart(block, _readable(block))
    readable = _ask(block)
    return None if readable is None else _take_apart(block, readable)


def _take_apart(block: Any, readable: _Readable) -> StandardBlock:
    parts = block._modules  # which is faster than asking the module
    attn, mlp, qkv, gelu_mlp = parts["attn"], parts["mlp"], None, None
    if readable.qkv:
        qkv = Weights.of(attn._modules["qkv"])
        if readable.separate_bias:
            qkv.bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if readable.gelu_mlp:
        gelu_mlp = Weights.of(mlp._modules["fc1"]), Weights.of(mlp._modules["fc2"])
    return StandardBlock(
        block=block,
        attn=attn,
        norm1=parts["norm1"] if readable.norm1 else None,
        norm2=parts["norm2"] if readable.norm2 else None,
        qkv=qkv,
        proj=Weights.of(attn._modules["proj"]) if readable.proj else None,
        bias=attn.score_bias() if readable.score_bias else None,
        gelu_mlp=gelu_mlp,
        layer_scales=readable.layer_scales,
    )


def split_block(block: Any) -> StandardBlock:
    """Return ``block`` in parts, for prompts that need them.

    Raises:
        NotImplementedError: it has to be called as it is.
    """
    parts = standard_block(block)
    if parts is None:
        raise NotImplementedError(
            f"learned keys and values need blocks whose attention can be taken apart, got one that has to be "
            f"called as it is: {fallback_reason(block)}; use another kind of prompts"
        )
    return parts


def _layer_scale(block: Any, number: int) -> str:
    """Return where the LayerScale of branch 1 or 2 is: "gamma", "plain" (a module), "none" or "called"."""
    if not hasattr(block, "ls1"):
        return "gamma"
    module = getattr(block, f"ls{number}")
    if is_plain(module, LayerScale):
        return "plain"
    return "none" if is_plain(module, nn.Identity) else "called"


def _is_gelu_mlp(mlp: Any) -> bool:
    if not is_plain(mlp, Mlp) or not is_plain(mlp.norm, nn.Identity):
        return False
    exact = is_plain(mlp.act, GELU, nn.GELU) and getattr(mlp.act, "approximate", "none") == "none"
    return (
        exact
        and all(is_plain(linear, *READABLE_LINEARS) for linear in (mlp.fc1, mlp.fc2))
        and all(is_plain(drop, nn.Dropout) for drop in (mlp.drop1, mlp.drop2))
    )


def _unless_identity(attn: nn.Module, name: str) -> nn.Module | None:
    module = attn._modules.get(name)
    return None if isinstance(module, nn.Identity) else module


def _is_affine(norm: Any) -> bool:
    return is_plain(norm, nn.LayerNorm, LayerNorm) and norm.weight is not None and norm.bias is not None
