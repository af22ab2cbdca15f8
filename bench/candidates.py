"""The launch configurations that bench/tune.py tries: block sizes, warps and stages of each Triton kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from vapt_fast.ops.triton_launch import Config

Candidates = list[Config]

KERNELS = {
    "prompt_pool": ("weights", "fwd", "bwd_grads", "bwd_products", "bwd_tokens"),
    "prompt_projector": ("fwd", "bwd_rows", "bwd_weights"),
    "add_norm": ("fwd", "bwd"),
    "prompt_attention": ("fwd", "bwd_queries", "bwd_keys"),
}
NAMES = tuple(f"{op}_{kernel}" for op, kernels in KERNELS.items() for kernel in kernels)


def blocks(names: str, *choices: tuple[int, ...]) -> Iterator[dict[str, int]]:
    """Yield each combination of block sizes, BLOCK_R to BLOCK_... for the letters or words of ``names``."""
    for values in product(*choices):
        yield {f"BLOCK_{name}": value for name, value in zip(names.split(), values, strict=True)}


def configs(found: Iterator[dict[str, int]], warps: tuple[int, ...], stages: tuple[int, ...]) -> Candidates:
    return [Config(of, w, s) for of in found for w in warps for s in stages]


def candidates(kernel: str, sizes: dict[str, int]) -> Candidates:
    """Return what to try for ``kernel`` where ``sizes`` are those that its table was asked for.

    What a configuration does not name is the default's.
    """
    rows = min(128, max(16, 1 << (sizes.get("rows", 1) - 1).bit_length()))
    prompts = tuple(block for block in (16, 32, 64) if block < max(32, 2 * sizes.get("prompts", 1)))
    whole = 1 << (sizes.get("channels", 768) - 1).bit_length()
    features = (sizes.get("features", 16),)
    projector = configs(blocks("ROWS R C", (16,), features, (64, 128, 256)), (4, 8), (1, 3))
    if features == (16,):  # rows in registers
        projector += configs(blocks("ROWS R C", (1, 2, 3, 4), (2, 4), (128,)), (1,), (1,))
    table: dict[str, Callable[[], Candidates]] = {
        "prompt_pool_weights": lambda: configs(blocks("R T", (4, 8, 16), (64, 256)), (4,), (1,)),
        "prompt_pool_fwd": lambda: configs(
            blocks("R T C", (min(rows, 64),), (32, 64), (64, 128)), (4,), (2, 3, 4)
        ),
        "prompt_pool_bwd_grads": lambda: configs(blocks("R C", (8, 16, 32), (64, 128)), (4,), (1,)),
        "prompt_pool_bwd_products": lambda: configs(
            blocks("R T C", (min(rows, 64),), (32, 64), (32, 64)), (4,), (2, 3, 4)
        ),
        "prompt_pool_bwd_tokens": lambda: configs(
            blocks("T R C", (64,), (16, 32, min(rows, 64)), (64, 128)), (4,), (1, 2)
        ),
        "prompt_projector_fwd": lambda: projector,
        "prompt_projector_bwd_rows": lambda: projector,
        "prompt_projector_bwd_weights": lambda: configs(
            blocks("ROWS C", (16, 32), (32, 64, 128)), (4,), (2, 3)
        ),
        "prompt_attention_fwd": lambda: configs(
            blocks("QUERIES TOKENS PROMPTS", (64, 128), (32, 64), prompts), (4, 8), (2, 3)
        ),
        "prompt_attention_bwd_queries": lambda: configs(
            blocks("QUERIES TOKENS PROMPTS", (64, 128), (32, 64), prompts), (4, 8), (2, 3)
        ),
        "prompt_attention_bwd_keys": lambda: configs(
            blocks("QUERIES KEYS", (32, 64), (32, 64, 128)), (4, 8), (2, 3, 4)
        ),
        "add_norm_fwd": lambda: configs(blocks("T C", (1, 2, 4), (256, whole)), (1, 2, 4), (1,)),
        "add_norm_bwd": lambda: configs(blocks("T C", (1, 2, 4), (256, whole)), (1, 2, 4), (1,)),
    }
    unique = {repr(config): config for config in table[kernel]()}
    return list(unique.values())
