"""Training, choosing a learning rate and saving, for VAPT and the methods it is compared with."""

from .errors import UserError
from .images import open_image
from .methods import METHODS, build_model
from .recipe import Recipe
from .saved import load_model, save_model
from .search import Found, search
from .splits import Splits, digit_splits, folder_splits
from .trainer import Score, Trainer, evaluate
from .transforms import data_config, eval_transform

__all__ = [
    "METHODS",
    "Found",
    "Recipe",
    "Score",
    "Splits",
    "Trainer",
    "UserError",
    "build_model",
    "data_config",
    "digit_splits",
    "eval_transform",
    "evaluate",
    "folder_splits",
    "load_model",
    "open_image",
    "save_model",
    "search",
]
