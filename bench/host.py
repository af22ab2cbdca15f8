"""The time that the host takes: Python, PyTorch's dispatch and autograd, but no kernel.

It bounds a training step on a GPU that finishes its kernels sooner than the host launches the next ones. Here
all runs on a CPU, with sizes so small that arithmetic is negligible, and the launch of every Triton kernel is
a stub that does nothing: what Triton itself takes for a launch, what the driver takes, and the numbers are
missing. PyTorch's own operations are executed, and cost about what their launch costs the host on a GPU.

Times are those of the thread on its CPU, so that other programs disturb them less. A block's is the
difference of a model of many blocks and one of few, by the number of blocks that they differ in: neither the
embedding nor the head is in it. Example:

    python bench/host.py --out host.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: with it they take tensors on a CPU

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from vapt_fast import AdaptiveViT, functional, use_backend
from vapt_fast.files import write_atomically

FEW, MANY = 2, 10  # blocks
DIM, TOKENS, PROMPTS = 16, 5, 3


def stub_launches() -> None:
    """From now on, in this process, launching a Triton kernel does nothing."""
    InterpretedFunction.run = lambda *args, **kwargs: None


def learned(*shape: int) -> Tensor:
    return torch.zeros(shape, requires_grad=True)


def ops() -> dict[str, Callable[[], Tensor]]:
    """A call of each op as a block makes it; the result that is differentiated."""
    x, branch, weight = learned(1, TOKENS, DIM), learned(1, TOKENS, DIM), torch.ones(DIM)
    affine: dict[str, Any] = {"norm_weight": weight, "norm_bias": weight}
    matrix, bias = learned(PROMPTS, TOKENS - 1), learned(PROMPTS)
    pooled, down, up = learned(1, PROMPTS, DIM), learned(8, DIM), learned(DIM, 8)
    qkv, prompt_kv = learned(1, TOKENS, 3 * DIM), learned(1, PROMPTS, 2 * DIM)
    q, heads = learned(1, 1, 2, DIM // 2), torch.zeros(2, DIM // 2, DIM)
    own = (learned(DIM), learned(DIM))
    one_head: dict[str, Any] = {"num_heads": 1, "num_kv_heads": 1, "scale": 1.0}
    f = functional
    return {
        "add_norm": lambda: f.add_norm(x, branch, weight, weight)[1],
        "prompt_pool": lambda: f.prompt_pool(x, matrix, *own, num_prefix=1, branch=branch, **affine)[2],
        "prompt_projector": lambda: f.prompt_projector(pooled, bias, down, up, eps=1e-6, **affine),
        "prompt_attention_packed": lambda: f.prompt_attention_packed(qkv, prompt_kv, **one_head),
        "absorbed_attention": lambda: f.absorbed_attention(q, x, pooled, heads, heads, scale=1.0),
        "mlp": lambda: f.mlp(x, down.detach(), None, up.detach(), None),
    }


def model(depth: int) -> Callable[[], Tensor]:
    """A ViT-B's structure with adaptive prompts, in training mode, on one image."""
    backbone = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=DIM, num_heads=2, depth=depth, num_classes=2
    )
    adaptive, image = AdaptiveViT(backbone, num_prompts=PROMPTS).train(), torch.zeros(1, 3, 8, 8)
    return lambda: adaptive(image)


def median(run: Callable[[], Any], calls: int) -> float:
    """Return the median time of a call in microseconds."""
    for _ in range(min(calls, 50)):
        run()
    times = []
    for _ in range(calls):
        began = time.thread_time()
        run()
        times.append(time.thread_time() - began)
    return statistics.median(times) * 1e6


def times(run: Callable[[], Tensor], calls: int) -> dict[str, float]:
    """Return the time of a call by itself, and of one with its backward pass."""
    gradient = torch.zeros_like(run())
    with torch.no_grad():
        forward = median(run, calls)
    return {
        "forward": forward,
        "forward and backward": median(lambda: run().backward(gradient), calls),
    }


def measure(calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the host's microseconds of each op and of a block."""
    with use_backend("triton"):
        few, many = ([times(model(depth), calls) for _ in range(rounds)] for depth in (FEW, MANY))
        measured = {name: times(run, calls) for name, run in ops().items()}
    measured["block"] = {
        mode: (min(m[mode] for m in many) - min(f[mode] for f in few)) / (MANY - FEW) for mode in few[0]
    }
    return measured


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--calls", type=int, default=300, help="of each, of which the median counts (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="of a block, of which the least counts (%(default)s)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    stub_launches()
    measured = measure(options.calls, options.rounds)
    for name, by_mode in measured.items():
        print(f"{name:24}", *(f"{mode} {value:7.1f} µs" for mode, value in by_mode.items()), sep="   ")
    if options.out is not None:
        write_atomically(options.out, (json.dumps(measured, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
