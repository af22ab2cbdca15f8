"""Workloads: one model, one batch of random data, one training step or one forward pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backbones import head_names, image_size
from ..backbones.precision import set_precision
from ..config import PromptConfig
from ..cuda_graphs import use_cuda_graphs
from ..cuda_graphs.recorder import RECORDERS
from ..model import AdaptiveViT
from ..names import create_backbone
from ..prompts import AdaptivePrompts, Prompts

__all__ = [
    "ATTENTION",
    "LINEAR_PROBE",
    "MODES",
    "PRECISIONS",
    "Precision",
    "Setting",
    "Variant",
    "Workload",
    "backbone_of",
]

NUM_CLASSES = 100
MODES = ("training step", "forward")
LINEAR_PROBE = "linear probe"
SEED = 0
WARM_UP = 3  # the third call of a kind is captured as a CUDA graph


@dataclass(frozen=True)
class Precision:
    """The precision that a model computes in.

    Attributes:
        weights: dtype of the backbone and of the images; the prompts stay in float32 at least.
        autocast: dtype of autocast, or None.
        tf32: whether products of float32 matrices may be rounded to TF32 (GPU only).
        backbone: of the products with frozen weights, see AdaptiveViT.backbone_precision.
    """

    weights: torch.dtype
    autocast: torch.dtype | None = None
    tf32: bool = False
    backbone: str | None = None

    @property
    def compute(self) -> torch.dtype:
        """The dtype of the large matrix products, which limits the accuracy."""
        return self.weights if self.autocast is None else self.autocast


PRECISIONS = {
    "float64": Precision(torch.float64),
    "float32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
    "bfloat16-autocast": Precision(torch.float32, autocast=torch.bfloat16),
    "float16-autocast": Precision(torch.float32, autocast=torch.float16),
    "bfloat16": Precision(torch.bfloat16),
    "bfloat16-tf32": Precision(torch.bfloat16, tf32=True),  # of what learned weights, in float32, multiply
    "bfloat16-fp8": Precision(torch.bfloat16, backbone="fp8"),
    "float16": Precision(torch.float16),
}

# None: matrix products and a softmax, as in the method's publication.
ATTENTION = {
    "explicit": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Setting:
    """The setting that all variants in one table share.

    Attributes:
        model: timm's name of the backbone, used with random weights: speed does not depend on their values.
        batch: images.
        device: "cpu", "cuda", "cuda:1", ...
        threads: of PyTorch on the CPU.
        image_size: side in pixels; None for the backbone's own.
        compiler: the backend of ``torch.compile``, for what is compiled.
    """

    model: str
    batch: int
    device: str
    threads: int
    image_size: int | None = None
    compiler: str = "inductor"

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a CUDA GPU."""
        return torch.device(self.device).type == "cuda"

    def synchronize(self) -> None:
        """Wait for the GPU, which is given work long before it has done it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Variant:
    """A variant: one of the things that are compared.

    Attributes:
        backend: of vapt_fast, or LINEAR_PROBE: the timm model itself without prompts, everything frozen but
            the head. So its training step has no backward pass through the blocks: a lower bound,
            not a rival.
        kind, num_prompts: see PromptConfig.
        precision: a key of PRECISIONS.
        attention: a key of ATTENTION to force one implementation; None for the backend's own choice.
        compile: a mode of ``torch.compile``; None runs uncompiled.
        cuda_graphs: whether AdaptiveViT may use CUDA graphs of its own, as it does by default.
    """

    backend: str
    kind: str = "adaptive"
    num_prompts: int = 0
    precision: str = "float32"
    attention: str | None = None
    compile: str | None = None
    cuda_graphs: bool = True

    def __str__(self) -> str:
        parts = [self.backend, self.precision]
        if self.attention is not None:
            parts.append(f"{self.attention} attention")
        if self.compile is not None:
            parts.append("compiled" if self.compile == "default" else f"compiled, {self.compile}")
        if not self.cuda_graphs:
            parts.append("no CUDA graphs")
        return ", ".join(parts)


class Workload:
    """A model with its data. Workloads of equal setting, kind and P start with equal weights and data."""

    def __init__(self, setting: Setting, variant: Variant) -> None:
        torch.set_num_threads(setting.threads)
        self.setting = setting
        self.variant = variant
        self.precision = PRECISIONS[variant.precision]
        self.model = _make_model(setting, variant)
        backbone = self.model.backbone if isinstance(self.model, AdaptiveViT) else self.model
        torch.manual_seed(SEED)
        channels: Any = backbone.in_chans
        images = torch.randn(setting.batch, channels, *image_size(backbone))
        self.images = images.to(setting.device, self.precision.weights)
        self.labels = torch.randint(NUM_CLASSES, (setting.batch,)).to(setting.device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, lr=1e-3, momentum=0.9, fused=True)
        self._call: Callable[[Tensor], Tensor] = self.model
        if variant.compile is not None:
            self._call = _compile(self.model, variant.compile, setting.compiler)

    def _training_step(self) -> None:
        """Run forward, loss, backward and optimizer step; a GPU may still be at it."""
        self.optimizer.zero_grad(set_to_none=True)
        self._loss(self._logits()).backward()
        self.optimizer.step()

    @torch.inference_mode()
    def _forward(self) -> None:
        """Run the forward pass of inference; a GPU may still be at it."""
        self._logits()

    def runner(self, mode: str) -> Callable[[], None]:
        """Return what is timed in ``mode``, one of MODES, and bring the model into it, with all dropouts on.

        As in anyone's loop that is done once: in a model of many modules it takes milliseconds. What is
        returned raises a RuntimeError where the model was brought into the other mode since.
        """
        step = {"training step": self._training_step, "forward": self._forward}[mode]
        trains = mode == "training step"
        self.model.train(trains)

        def run() -> None:
            if self.model.training != trains:
                raise RuntimeError(f"the model is no longer in the mode of a {mode}: ask for a runner again")
            with self._conditions():
                step()

        return run

    def captured(self, mode: str, pool: Any = None) -> Callable[[], None]:
        """Return what is timed as one CUDA graph.

        Args:
            mode: one of MODES.
            pool: of ``torch.cuda.graph_pool_handle()``, shared by graphs of which one runs at a time.
        """
        run, stream = self.runner(mode), torch.cuda.Stream(self.setting.device)
        stream.wait_stream(torch.cuda.current_stream(self.setting.device))
        graph = torch.cuda.CUDAGraph()
        with use_cuda_graphs(False):  # of its own, within this one
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream(self.setting.device).wait_stream(stream)
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run()
        return graph.replay

    def outputs(self) -> dict[str, Tensor]:
        """Return logits in eval and training mode and every gradient, by name; all have the same masks.

        Gradients of one kind of parameter are one tensor for all blocks: alone some nearly vanish, and in a
        low precision nothing of them is right. All is computed as ``runner`` does it, so that nothing has to
        be compiled for this alone, and by CUDA graphs where those are timed.
        """
        warm_up = WARM_UP if torch.device(self.setting.device).type in RECORDERS else 0
        with self._conditions():
            with torch.inference_mode():
                self.model.eval()
                for _ in range(warm_up):
                    self._logits()
                outputs = {"logits": [self._logits()]}
            self.model.train()
            for _ in range(warm_up):
                self._logits()
            self.model.zero_grad(set_to_none=True)
            torch.manual_seed(SEED)
            logits = self._logits()
            outputs["logits in training"] = [logits]
            self._loss(logits).backward()
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                kind = re.sub(r"\.\d+\.", ".*.", name)
                outputs.setdefault(f"gradient of {kind}", []).append(parameter.grad)
        self.model.zero_grad(set_to_none=True)
        return {
            name: torch.cat([t.detach().double().flatten() for t in tensors])
            for name, tensors in outputs.items()
        }

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        """Set what the variant says about the whole process, while it runs."""
        name, tf32 = self.variant.attention, self.precision.tf32
        attention = None if name is None else ATTENTION[name]
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        with ExitStack() as stack:
            if attention is not None:
                stack.enter_context(sdpa_kernel(attention))
            if not self.variant.cuda_graphs:
                stack.enter_context(use_cuda_graphs(False))
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before[0])
                torch.backends.cudnn.allow_tf32 = before[1]

    def _logits(self) -> Tensor:
        dtype = self.precision.autocast
        with torch.autocast(self.images.device.type, dtype, enabled=dtype is not None):
            return self._call(self.images)

    def _loss(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), self.labels)


def backbone_of(setting: Setting) -> nn.Module:
    """Return the timm model with random weights in float32, to copy from.

    It is made once: initialising a ViT-B takes a second, copying it does not.
    """
    return _make_backbone(setting.model, setting.image_size, setting.device)


@cache
def _make_backbone(model: str, image_size: int | None, device: str) -> nn.Module:
    torch.manual_seed(SEED)
    options = {} if image_size is None else {"img_size": image_size}
    return create_backbone(model, num_classes=NUM_CLASSES, **options).to(device)


def _make_model(setting: Setting, variant: Variant) -> Any:
    model: Any = copy.deepcopy(backbone_of(setting))
    precision = PRECISIONS[variant.precision]
    model = model.to(precision.weights).requires_grad_(False)
    if variant.attention == "explicit":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    if variant.backend == LINEAR_PROBE:
        set_precision(model.blocks, precision.backbone)
        for name in head_names(model):
            getattr(model, name).requires_grad_(True)
        return model
    config = PromptConfig(kind=variant.kind, num_prompts=variant.num_prompts, prompt_dropout=0.1)
    torch.manual_seed(SEED)
    options: dict[str, Any] = {"backend": variant.backend, "backbone_precision": precision.backbone}
    adapted = AdaptiveViT(model, prompts=config, **options)
    adapted.prompts.to(torch.promote_types(precision.weights, torch.float32))
    make_trained_like(adapted.prompts)
    return adapted


def make_trained_like(prompts: Prompts) -> None:
    """Fill the projections, which start at zero: products with zeros can be faster."""
    generator = torch.Generator().manual_seed(SEED)
    for block in prompts.blocks:
        if isinstance(block, AdaptivePrompts):
            for parameter in block.token_projection.parameters():
                values = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    parameter.copy_(0.02 * values)


def _compile(model: nn.Module, mode: str, compiler: str) -> Callable[[Tensor], Tensor]:
    """Compile ``model`` whole, with dropout masks from PyTorch's own generator, as all others have them.

    With other masks its gradients could not be compared with the others'.
    """
    if compiler != "inductor":
        return torch.compile(model, backend=compiler, fullgraph=True)
    options = {} if mode == "default" else torch._inductor.list_mode_options(mode)
    return torch.compile(model, options={**options, "fallback_random": True}, fullgraph=True)
