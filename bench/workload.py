"""What is measured: one model, one batch of random data, one training step or one forward pass."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapt_fast import AdaptiveViT, PromptConfig
from vapt_fast.prompts import AdaptivePrompts, Prompts

NUM_CLASSES = 100
MODES = ("training step", "forward")
LINEAR_PROBE = "linear probe"
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What is the same for everything that is compared in one run.

    Attributes:
        model: timm's name of the backbone, used with random weights: speed does not depend on their values.
        batch: images.
        device: "cpu" or "cuda".
        dtype: of weights and images.
        amp: dtype of autocast, or None.
        threads: of PyTorch on the CPU.
    """

    model: str
    batch: int
    device: str
    dtype: str
    amp: str | None
    threads: int

    @staticmethod
    def add_options(add: Callable[..., Any]) -> None:
        """The command-line options; ``add`` is ``add_argument`` of argparse or pytest's ``addoption``."""
        add("--model", default="vit_base_patch16_224", help="timm's name of the backbone (%(default)s)")
        add("--batch", type=int, help="images (CPU: 8, GPU: 64)")
        add("--device", help="cpu or cuda (cuda where there is one)")
        add("--dtype", default="float32", help="of weights and images (%(default)s)")
        add("--amp", choices=("none", "bfloat16"), help="autocast (CPU: none, GPU: bfloat16)")
        add("--threads", type=int, help="CPU threads (PyTorch's own choice)")

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Setting:
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = device != "cpu"
        amp = options.amp or ("bfloat16" if on_gpu and options.dtype == "float32" else "none")
        return cls(
            model=options.model,
            batch=options.batch or (64 if on_gpu else 8),
            device=device,
            dtype=options.dtype,
            amp=None if amp == "none" else amp,
            threads=options.threads or torch.get_num_threads(),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the large matrix products: the one that limits the accuracy."""
        return getattr(torch, self.amp or self.dtype)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, self.compute_dtype) if self.amp else nullcontext()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.torch_dtype)

    def synchronize(self) -> None:
        """Wait for the GPU, which is given work long before it has done it."""
        if self.device != "cpu":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared.

    Attributes:
        backend: of vapt_fast, or LINEAR_PROBE: the timm model itself without prompts, everything frozen but
            the head. So its training step has no backward pass through the blocks: the price of doing
            nothing, not a rival.
        kind, num_prompts: see PromptConfig.
    """

    backend: str
    kind: str = "adaptive"
    num_prompts: int = 0

    def __str__(self) -> str:
        if self.backend == LINEAR_PROBE:
            return LINEAR_PROBE
        return f"{self.backend}, {self.kind}, P = {self.num_prompts}"


class Workload:
    """A model with its data. Workloads of equal setting, kind and P start with equal weights and data."""

    def __init__(self, setting: Setting, variant: Variant) -> None:
        torch.set_num_threads(setting.threads)
        torch.manual_seed(SEED)
        self.setting = setting
        self.model = _make_model(setting, variant)
        size = (
            self.model.backbone if isinstance(self.model, AdaptiveViT) else self.model
        ).patch_embed.img_size
        self.images = setting.randn(setting.batch, 3, *size)
        self.labels = torch.randint(NUM_CLASSES, (setting.batch,), device=setting.device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9, fused=True)

    def training_step(self) -> None:
        """Forward, loss, backward and optimizer step, with all dropouts on; until it is done."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss(self._logits()).backward()
        self.optimizer.step()
        self.setting.synchronize()

    @torch.inference_mode()
    def forward(self) -> None:
        """The forward pass of inference; until it is done."""
        self.model.eval()
        self._logits()
        self.setting.synchronize()

    def runner(self, mode: str) -> Callable[[], None]:
        """What is timed in ``mode``, one of MODES."""
        return {"training step": self.training_step, "forward": self.forward}[mode]

    def outputs(self) -> dict[str, Tensor]:
        """Logits in eval and training mode and every gradient, by name; the same dropout masks for all."""
        with torch.no_grad():
            self.model.eval()
            outputs = {"logits": self._logits()}
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(SEED)
        outputs["logits in training"] = logits = self._logits()
        self._loss(logits).backward()
        gradients = {f"gradient of {n}": p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}

    def _logits(self) -> Tensor:
        with self.setting.autocast():
            return self.model(self.images)

    def _loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.labels)


def _make_model(setting: Setting, variant: Variant) -> nn.Module:
    model = timm.create_model(setting.model, num_classes=NUM_CLASSES)
    if variant.backend == LINEAR_PROBE:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    else:
        config = PromptConfig(kind=variant.kind, num_prompts=variant.num_prompts, prompt_dropout=0.1)
        model = AdaptiveViT(model, prompts=config, backend=variant.backend)
        make_trained_like(model.prompts)
    return model.to(setting.device, setting.torch_dtype)


def make_trained_like(prompts: Prompts) -> None:
    """Weights that are not zero: the projections start at zero, and zeros are faster than numbers."""
    for block in prompts.blocks:
        if isinstance(block, AdaptivePrompts):
            nn.init.normal_(block.token_projection.weight, std=0.02)
            nn.init.normal_(block.token_projection.bias, std=0.02)
