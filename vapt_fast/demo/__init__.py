"""The demo: methods compared on real digit images, with a small backbone that comes with its weights.

Importing this package registers ``vit_digits_patch4_32`` (and the name with ``vapt_``) with timm and loads
nothing heavy: scikit-learn, which carries the images, and matplotlib are imported where they are used.
"""

from ..registry import register
from .backbone import vit_digits_patch4_32
from .digits import NEW_DIGITS, OLD_DIGITS, digit_images

register("vit_digits_patch4_32")

__all__ = ["NEW_DIGITS", "OLD_DIGITS", "digit_images", "vit_digits_patch4_32"]
