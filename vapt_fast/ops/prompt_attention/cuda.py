"""prompt_attention on CUDA: the launches of csrc/prompt_attention, by vapt_fast._C."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import HALF, unsupported_mixture
from ..cuda_launch import address, aligned, launch, rows
from .op import Arguments, Gradients, Outputs, Saved

__all__ = ["backward", "forward", "unsupported_reasons"]

LARGEST_HEAD = 128  # channels
WIDE_HEAD = 64  # those of more channels are wide
TILE = 64  # rows
MOST_ROWS = 832  # of queries and keys, each in whole tiles
MOST_WIDE_ROWS = 320  # of queries, and of keys, with wide heads


def unsupported_reasons(args: Arguments) -> list[str]:
    """Every reason why the kernels can't take ``args``."""
    queries, heads, dim = args.q.shape[1:]
    keys = args.prompt_k.shape[1] + args.k.shape[1]
    reasons = unsupported_mixture(*args[:5], known=HALF)
    if args.bias is not None:
        reasons.append("it has no bias, got one")
    if args.prompt_lengths is not None:
        reasons.append("it has no prompt_lengths, got some")
    if args.k.shape[2] != heads:
        reasons.append(f"k must have q's {heads} heads, got {args.k.shape[2]}")
    if dim % 8 or not 8 <= dim <= LARGEST_HEAD:
        reasons.append(f"heads must have 8, 16, 24, ... or {LARGEST_HEAD} channels, got {dim}")
    if not keys:
        reasons.append("there must be a key, got no prompt and no token")
    elif dim <= WIDE_HEAD and _padded(queries) + _padded(keys) > MOST_ROWS:
        reasons.append(
            f"{queries} queries and {keys} keys don't fit in shared memory: in whole tiles of {TILE} they "
            f"must be at most {MOST_ROWS}"
        )
    elif dim > WIDE_HEAD and max(queries, keys) > MOST_WIDE_ROWS:
        reasons.append(
            f"{queries} queries and {keys} keys don't fit in shared memory: of heads with more than "
            f"{WIDE_HEAD} channels there must be at most {MOST_WIDE_ROWS} of each"
        )
    return reasons


def forward(args: Arguments, out: Outputs) -> None:
    """Write out and lse."""
    inputs = _inputs(args)
    launch(
        "prompt_attention_forward", args.q, **_given(args, inputs), out=rows(out.out), lse=address(out.lse)
    )


def backward(saved: Saved, grad_results: tuple[Tensor], grads: Gradients) -> None:
    """Write the gradients of queries, keys and values, of tokens and prompts, that are needed."""
    args = Arguments(*saved[2:])
    inputs, grad_out = _inputs(args), aligned(grad_results[0])
    grad_prompts = grads.prompt_k, grads.prompt_v
    # Those of prompts that all images share are summed over the images.
    shared = grads.prompt_k is not None and saved.prompt_k.shape[0] != saved.q.shape[0]
    by_image = saved.q.new_empty((2, saved.q.shape[0], *saved.prompt_k.shape[1:])) if shared else None
    of_prompts = grad_prompts if by_image is None else by_image.unbind()
    launch(
        "prompt_attention_backward",
        args.q,
        **_given(args, inputs),
        out=rows(saved.out),
        lse=address(saved.lse),
        grad_out=rows(grad_out),
        grad_q=rows(grads.q),
        grad_k=rows(grads.k),
        grad_v=rows(grads.v),
        grad_prompt_k=rows(of_prompts[0]),
        grad_prompt_v=rows(of_prompts[1]),
    )
    if by_image is not None:
        for grad, images in zip(grad_prompts, by_image, strict=True):
            torch.sum(images, dim=0, keepdim=True, out=grad)


def _padded(rows: int) -> int:
    """The rows of whole tiles."""
    return (rows + TILE - 1) // TILE * TILE


def _inputs(args: Arguments) -> tuple[Tensor, ...]:
    """q, k, v and the prompts' as the kernels take them; they must live until the launch."""
    q, k, v, prompt_k, prompt_v = map(aligned, args[:5])
    batch = q.shape[0]
    return q, k, v, prompt_k.expand(batch, -1, -1, -1), prompt_v.expand(batch, -1, -1, -1)


def _given(args: Arguments, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    batch, queries, heads, dim = args.q.shape
    names = ("q", "k", "v", "prompt_k", "prompt_v")
    return {
        "dtype": str(args.q.dtype).removeprefix("torch."),
        "batch": batch,
        "queries": queries,
        "tokens": args.k.shape[1],
        "prompts": args.prompt_k.shape[1],
        "heads": heads,
        "channels": dim,
        "scale": args.scale,
        **{name: rows(tensor) for name, tensor in zip(names, inputs, strict=True)},
    }
