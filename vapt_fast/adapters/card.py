"""The card of an adapter on the Hugging Face Hub: a README.md with the metadata that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from ..arguments import real
from ..config import PromptConfig
from .file import BASE_MODEL_KEY, AdapterFile

__all__ = ["model_card"]

MOST_NAMES = 20  # of classes, in the card


def model_card(
    adapter: AdapterFile,
    repo_id: str,
    *,
    license: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Mapping[str, float] | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Return the card's text.

    Args:
        adapter: the adapter, as read from its folder.
        repo_id: "owner/name" of its repository.
        license, datasets, metrics, tags: as for vapt_fast.adapters.hub.push.

    Raises:
        TypeError: one str for several datasets or tags, or metrics that are no numbers.
    """
    from huggingface_hub import EvalResult, ModelCardData

    for name, value in (("datasets", datasets), ("tags", tags)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a list of str, got {value!r}")
    metrics = _metrics(adapter) if metrics is None else metrics
    metrics = {name: real(f"metrics {name}", value) for name, value in metrics.items()}
    base_model = adapter.config[BASE_MODEL_KEY]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=datasets[0],
            dataset_name=datasets[0],
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
        if datasets  # the Hub has no results without one
    ]
    data = ModelCardData(
        library_name="vapt_fast",
        pipeline_tag="image-classification",
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter",
        license=license,
        datasets=list(datasets) or None,
        metrics=list(metrics) or None,
        tags=list(dict.fromkeys(["timm", "prompt-tuning", "vapt", *tags])),
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_text(adapter, repo_id, metrics)}"


def _metrics(adapter: AdapterFile) -> dict[str, float]:
    """The accuracy in the adapter's metadata: ``vapt-fast train``'s, on test images, or the user's."""
    metadata = adapter.config["metadata"]
    for key in ("test_accuracy", "accuracy"):
        value = metadata.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"accuracy": value}
    return {}


def _text(adapter: AdapterFile, repo_id: str, metrics: Mapping[str, float]) -> str:
    backbone = adapter.backbone["name"] or "a timm model that is not on the Hub"
    names = adapter.config.get("class_names")
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"Prompts and a head for the frozen Vision Transformer `{backbone}`, {adapter.num_classes} classes, "
        "saved by [vapt_fast](https://arxiv.org/abs/2501.18936).",
        "```python\nimport vapt_fast\n\n"
        f'model = vapt_fast.AdaptiveViT.from_adapter("hf-hub:{repo_id}")  # in eval mode\n'
        "logits = model(model.transform()(image)[None])  # image: a PIL image\n```",
    ]
    if metrics:
        rows = "".join(f"| {name} | {value:g} |\n" for name, value in metrics.items())
        parts.append(f"| metric | value |\n| --- | --- |\n{rows}".rstrip())
    parts += ["The options of the prompts that differ from their defaults:", _code(_options(adapter.prompts))]
    if names is not None:
        more = "" if len(names) <= MOST_NAMES else f", the first {MOST_NAMES} of {len(names)}"
        parts += [f"The names of the classes{more}:", _code(names[:MOST_NAMES])]
    return "\n\n".join(parts) + "\n"


def _options(prompts: PromptConfig) -> dict[str, object]:
    defaults = asdict(PromptConfig())
    own = {name: value for name, value in asdict(prompts).items() if value != defaults[name]}
    return {"kind": prompts.kind, "num_prompts": prompts.num_prompts} | own


def _code(value: object) -> str:
    """A block in which no name that users gave is Markdown."""
    text = json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")
    return f"```json\n{text}\n```"
