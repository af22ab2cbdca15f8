"""The demo: methods compared on real digit images, with a small backbone that comes with its weights.

Importing this package registers ``vit_digits_patch4_32`` with timm and loads nothing heavy: scikit-learn,
which carries the images, and matplotlib are imported where they are used.
"""

from .backbone import vit_digits_patch4_32
from .digits import NEW_DIGITS, OLD_DIGITS, digit_images

__all__ = ["NEW_DIGITS", "OLD_DIGITS", "digit_images", "vit_digits_patch4_32"]
