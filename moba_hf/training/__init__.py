"""Training with MoBA: recipes and their callback, context-extension stages, data rows, the chunked loss."""

from moba_hf.evaluate.repositories import Repository, read_repository
from moba_hf.training.callback import (
    RECIPES,
    MobaCallback,
    Recipe,
    recipe_of,
    trailing_loss,
    turn_on,
)
from moba_hf.training.loss import LongRowTrainer, loss_in_pieces
from moba_hf.training.rows import Rows
from moba_hf.training.stages import Schedule, Stage

__all__ = [
    "RECIPES",
    "LongRowTrainer",
    "MobaCallback",
    "Recipe",
    "Repository",
    "Rows",
    "Schedule",
    "Stage",
    "loss_in_pieces",
    "read_repository",
    "recipe_of",
    "trailing_loss",
    "turn_on",
]
