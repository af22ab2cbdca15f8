"""A picture of what a model looked at in one image."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data import full_data_config
from ..modules import evaluating
from .attention import attention_weights, rollout
from .contributions import prompt_maps
from .grad_cam import check_targets, grad_cam, normalise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..model import AdaptiveViT

__all__ = ["explain_picture"]

_COLUMNS = 4
_NUM_CLASSES = 5  # in the bars
_LINE = 40  # characters above or in a panel; what is wider makes the others narrow, or runs over them


@torch.no_grad()
def explain_picture(
    model: AdaptiveViT,
    image: Any,
    target: int | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> bytes:
    """Draw what speaks for a class in an image, and what the prompts have to do with it.

    Above stand the likeliest classes. The panels: the image as the model sees it, Grad-CAM, attention
    rollout, how much each patch attends to prompts, and for four of the blocks with adaptive prompts which
    patches shape these. In place of a panel that the model does not allow stands the reason.

    Args:
        model: any with a head.
        image: of PIL.
        target: the number of the class to explain; None for the one that the model predicts.
        class_names: what the classes are called; None for the model's ``class_names``, else their numbers.

    Returns:
        The content of a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
        TypeError, ValueError: there is no such class.
        NotImplementedError: as ``prompt_maps`` raises it.
    """
    try:
        # The object-oriented interface: pyplot would choose a window system.
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the picture needs matplotlib, which is not installed; "
            "install it with: pip install 'vapt_fast[demo]'"
        ) from error
    weight = next(model.backbone.parameters())
    images = model.transform()(image).unsqueeze(0).to(weight)
    with evaluating(model):
        probabilities = model(images).float().softmax(1)
    index = int(check_targets(target, probabilities))
    names = class_names or model.class_names or [str(number) for number in range(model.num_classes)]

    panels: list[tuple[str, Callable[[], Tensor]]] = [
        (f"Grad-CAM for “{names[index]}”", lambda: grad_cam(model, images, index)),
        ("attention rollout", lambda: rollout(model, images)),
        ("attention to prompts", lambda: _to_prompts(model, images)),
    ]
    shaping = [
        (f"shapes the prompts of block {block}", lambda maps=maps: maps.norm(dim=1))
        for block, maps in _spread(prompt_maps(model, images))
    ]
    rows = 2 if shaping else 1
    figure = Figure(figsize=(3 * _COLUMNS, 3.4 * rows + 0.4), layout="constrained", dpi=150)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    pixels = _displayed(model, images)
    for one in axes.flat:
        one.set_axis_off()
    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title("image", fontsize=10)
    likeliest = fill("   ".join(_likeliest(probabilities[0], names)), 3 * _LINE)
    figure.suptitle(likeliest, fontsize=11, parse_math=False)
    for one, (title, make) in zip([*axes[0, 1:], *axes[1:].flat], [*panels, *shaping], strict=False):
        one.set_title(fill(title, _LINE), fontsize=10, parse_math=False)  # names may have a "$"
        try:
            heat = normalise(make())[0]
        except NotImplementedError as error:
            one.text(0.5, 0.5, fill(str(error), _LINE), ha="center", va="center", fontsize=7)
        else:
            _draw(one, pixels, heat)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _to_prompts(model: AdaptiveViT, images: Tensor) -> Tensor:
    """Return the share of its attention that each patch (B, H, W) gives to prompts, the mean of all heads."""
    shares = [one.to_prompts.sum(-1).mean(1) for one in attention_weights(model, images).values()]
    return torch.stack(shares).mean(0)[:, model.num_prefix_tokens :].unflatten(1, model.grid)


def _spread(maps: dict[int, Tensor]) -> list[tuple[int, Tensor]]:
    """Return at most a row of the maps, of blocks from the first to the last."""
    count = min(len(maps), _COLUMNS)
    chosen = torch.linspace(0, len(maps) - 1, count).round().int().tolist()
    return [list(maps.items())[position] for position in chosen]


def _displayed(model: AdaptiveViT, images: Tensor) -> Any:
    """Return the prepared image as colours, (height, width, 3 or 1) of 0 to 1, for matplotlib."""
    config = full_data_config(model.pretrained_cfg, model.data_config)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = (images[0].float().cpu() * std + mean).clamp(0, 1)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()


def _likeliest(probabilities: Tensor, names: Sequence[str]) -> list[str]:
    best = probabilities.topk(min(_NUM_CLASSES, len(probabilities)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [f"{share:.0%} {names[index]}" for share, index in pairs]


def _draw(axes: Axes, pixels: Any, heat: Tensor) -> None:
    """Draw a map (H, W) of 0 to 1 over the pixels, which stay visible where it is low."""
    height, width, _ = pixels.shape
    axes.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=1)
    over = (-0.5, width - 0.5, height - 0.5, -0.5)
    values = heat.float().cpu().numpy()
    axes.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.7, extent=over, interpolation="bicubic")
