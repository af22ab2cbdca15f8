"""Training, the choice of a learning rate and saving, for VAPT and the methods it is compared with."""

from .errors import UserError
from .evaluation import Score, evaluate
from .images import open_image
from .methods import METHODS, build_model
from .options import RunOptions
from .recipe import Recipe
from .run import run
from .saved import load_model, save_model
from .search import Found, search
from .splits import Splits, digit_splits, folder_splits
from .trainer import Trainer
from .transforms import eval_transform

__all__ = [
    "METHODS",
    "Found",
    "Recipe",
    "RunOptions",
    "Score",
    "Splits",
    "Trainer",
    "UserError",
    "build_model",
    "digit_splits",
    "eval_transform",
    "evaluate",
    "folder_splits",
    "load_model",
    "open_image",
    "run",
    "save_model",
    "search",
]
