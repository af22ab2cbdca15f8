"""Retrieval: pictures by pictures, with frozen or adapted features, and pictures by texts and back."""

from .features import embed, image_features
from .image_text import ImageTextModel, evaluate_image_text
from .scores import ImageTextRecall, RetrievalScore, image_retrieval, image_text_retrieval

__all__ = [
    "ImageTextModel",
    "ImageTextRecall",
    "RetrievalScore",
    "embed",
    "evaluate_image_text",
    "image_features",
    "image_retrieval",
    "image_text_retrieval",
]
