"""Recall and mean average precision of retrieval, exactly, in chunks of queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...arguments import integer

__all__ = ["ImageTextRecall", "RetrievalScore", "image_retrieval", "image_text_retrieval"]

KS = (1, 5, 10)


@dataclass(frozen=True)
class RetrievalScore:
    """The quality of a ranking of a gallery for each query.

    Attributes:
        recall: by k, the share of the queries with at least one relevant item among the first k.
        mean_average_precision: the mean over the queries of the mean precision at each relevant item.
        num_queries: queries that have a relevant item; the others don't count.
    """

    recall: dict[int, float]
    mean_average_precision: float
    num_queries: int


@dataclass(frozen=True)
class ImageTextRecall:
    """Recall between images and texts, by k.

    Attributes:
        image_to_text: share of the images with any of their texts among the first k.
        text_to_image: share of the texts whose image is among the first k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def rsum(self) -> float:
        """The sum of all recalls, in percent, as papers report it."""
        return 100 * sum([*self.image_to_text.values(), *self.text_to_image.values()])


@torch.no_grad()
def image_retrieval(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    ks: Sequence[int] = KS,
    chunk_size: int = 1024,
) -> RetrievalScore:
    """Rank a gallery by inner product for each query; items of the query's label are relevant.

    Of equal similarities, the item that comes first in the gallery ranks first.

    Args:
        queries: features (Q, D), floating; normalised ones for cosine similarity.
        query_labels: (Q), integers.
        gallery, gallery_labels: (N, D) and (N). None: the queries themselves, each without itself.
        ks: the k of recall at k.
        chunk_size: queries ranked at once; it takes memory of chunk_size * N.

    Raises:
        TypeError, ValueError: shapes that don't go together, features that aren't finite, or no query with a
            relevant item.
    """
    itself = gallery is None
    items, labels = (queries, query_labels) if gallery is None else (gallery, gallery_labels)
    if labels is None:
        raise ValueError("gallery_labels are missing: give them with the gallery")
    _check(queries, "queries", query_labels, "query_labels")
    _check(items, "gallery", labels, "gallery_labels")
    _check_same_width(queries, items, "queries", "gallery")
    ks = _checked(ks)
    hits, precision, num_queries = torch.zeros(len(ks), dtype=torch.int64), 0.0, 0
    for start, similarity in _chunks(queries, items, chunk_size):
        relevant = query_labels[start : start + len(similarity), None] == labels
        if itself:
            own = torch.arange(len(similarity), device=similarity.device)
            similarity[own, start + own] = -torch.inf
            relevant[own, start + own] = False
        known = relevant.any(1)
        similarity, relevant = similarity[known], relevant[known]
        hits += _hits(_first_ranks(similarity, relevant), ks)
        ranked = relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
        precision += _average_precision(ranked).sum().item()
        num_queries += len(relevant)
    if not num_queries:
        raise ValueError("query_labels must have some in common with the gallery's, got none")
    recall = {k: hit / num_queries for k, hit in zip(ks, hits.tolist(), strict=True)}
    return RetrievalScore(recall, precision / num_queries, num_queries)


@torch.no_grad()
def image_text_retrieval(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    *,
    ks: Sequence[int] = KS,
    chunk_size: int = 1024,
) -> ImageTextRecall:
    """Measure recall at k from images to texts and back, with any number of texts an image.

    An image is a hit if any of its texts is among the first k (of five captions, the best counts), as is
    usual for Flickr30k and COCO. Of equal similarities, the item with the lower index ranks first.

    Args:
        images: features (N, D), floating, normalised.
        texts: features (M, D).
        image_of_text: (M), integers: the index of each text's image. Each image needs a text.
        ks: the k of recall at k.
        chunk_size: queries ranked at once; it takes memory of chunk_size * max(N, M).

    Raises:
        TypeError, ValueError: shapes that don't go together, features that aren't finite, or images without
            a text.
    """
    _check(texts, "texts", image_of_text, "image_of_text")
    own = torch.arange(len(images), device=images.device)
    _check(images, "images", own, "images")
    _check_same_width(images, texts, "images", "texts")
    if not torch.equal(image_of_text.unique(), own.to(image_of_text.dtype)):
        raise ValueError(
            f"image_of_text must name each of the {len(images)} images, by its index, at least once"
        )
    ks = _checked(ks)
    image_hits, text_hits = torch.zeros(2, len(ks), dtype=torch.int64)
    for start, similarity in _chunks(images, texts, chunk_size):
        relevant = own[start : start + len(similarity), None] == image_of_text
        image_hits += _hits(_first_ranks(similarity, relevant), ks)
    for start, similarity in _chunks(texts, images, chunk_size):
        relevant = image_of_text[start : start + len(similarity), None] == own
        text_hits += _hits(_first_ranks(similarity, relevant), ks)
    recalls = [
        {k: hit / total for k, hit in zip(ks, hits.tolist(), strict=True)}
        for hits, total in ((image_hits, len(images)), (text_hits, len(texts)))
    ]
    return ImageTextRecall(*recalls)


def _checked(ks: Sequence[int]) -> list[int]:
    return [integer("ks", k, minimum=1) for k in ks]


def _check(features: Tensor, name: str, labels: Tensor, labels_name: str) -> None:
    """Raise unless features are (N, D), floating and finite, and labels (N)."""
    if not features.is_floating_point() or features.ndim != 2:
        raise TypeError(
            f"{name} must be floating features (N, D), got {features.dtype} of shape {tuple(features.shape)}"
        )
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"{labels_name} must be ({len(features)},), one for each of {name}, got {tuple(labels.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinities")


def _check_same_width(first: Tensor, second: Tensor, *names: str) -> None:
    if first.shape[1] != second.shape[1] or first.dtype != second.dtype:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same width and dtype, got {tuple(first.shape)}, "
            f"{first.dtype}, and {tuple(second.shape)}, {second.dtype}"
        )


def _chunks(queries: Tensor, items: Tensor, chunk_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of a first query, and the similarities (c, N) of the queries from there on.

    A sum of products is rounded otherwise at another place of a matrix, and in one of another size. In
    float64, and then rounded to what the features are, equal items are equally similar, whatever the chunks.
    """
    size = integer("chunk_size", chunk_size, minimum=1)
    dtype, items = torch.promote_types(items.dtype, torch.float32), items.double()
    for start in range(0, len(queries), size):
        yield start, (queries[start : start + size].double() @ items.T).to(dtype)


def _first_ranks(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Return the rank (c), from 0, of the best relevant item of each row (c, N); each row has one."""
    best = similarity.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
    tied = similarity == best
    first = (tied & relevant).int().argmax(1, keepdim=True)  # the first, as argmax promises
    earlier = torch.arange(similarity.shape[1], device=similarity.device) < first
    return ((similarity > best) | (tied & earlier)).sum(1)


def _hits(ranks: Tensor, ks: Sequence[int]) -> Tensor:
    """Return for each k how many ranks are among the first k, on the CPU."""
    return torch.stack([(ranks < k).sum() for k in ks]).cpu()


def _average_precision(ranked: Tensor) -> Tensor:
    """Return the mean precision at the relevant items of each row (c, N), which are in ranked order."""
    places = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    precision = ranked.cumsum(1).double() / places
    return (precision * ranked).sum(1) / ranked.sum(1)
