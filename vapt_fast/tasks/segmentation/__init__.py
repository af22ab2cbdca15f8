"""Semantic segmentation: a decoder on a frozen ViT with prompts, trained, evaluated and run on images."""

from .data import MaskedImages, Preparation, mask_splits, open_mask
from .decoders import DECODERS, Decoder
from .metric import IGNORED, PixelEvaluation, confusion_matrix
from .model import Segmenter
from .task import evaluate_pixels
from .windows import sliding_window

__all__ = [
    "DECODERS",
    "IGNORED",
    "Decoder",
    "MaskedImages",
    "PixelEvaluation",
    "Preparation",
    "Segmenter",
    "confusion_matrix",
    "evaluate_pixels",
    "mask_splits",
    "open_mask",
    "sliding_window",
]
