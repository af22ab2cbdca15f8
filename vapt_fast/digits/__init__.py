"""A small Vision Transformer that comes with its weights, and the real digit images to try it on.

Importing this package registers ``vit_digits_patch4_32`` with timm. scikit-learn, which carries the images,
is imported only when they are read.
"""

from .images import IMAGE_SIZE, digit_images
from .model import vit_digits_patch4_32

__all__ = ["IMAGE_SIZE", "digit_images", "vit_digits_patch4_32"]
