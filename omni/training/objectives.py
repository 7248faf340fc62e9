"""What is learnt: small objects of which the training loop knows nothing but what stands here."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import EvalPrediction

from omni.training.alignment import Alignment
from omni.training.answers import AnswerTraining
from omni.training.contrastive import ContrastiveAlignment
from omni.training.distillation import Distillation
from omni.training.recipe import Recipe
from omni.training.transcription import Transcription
from omni.worlds import find_world


class Objective(Protocol):
    """What the training loop needs: a model that returns a loss, its processor, data, and what to make of outputs."""

    model: nn.Module
    processor: Any
    train: Any
    evaluate: Any
    collate: Any

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Outputs of an evaluation step to what `metrics` needs of them."""

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Scores of an evaluation."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the finished checkpoint."""


OBJECTIVES: dict[str, type[Any]] = {
    "contrastive": ContrastiveAlignment,
    "answers": AnswerTraining,
    "distillation": Distillation,
    "transcription": Transcription,
    "alignment": Alignment,
}


def make_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe: one of these, or one that the world that is drawn brings."""
    objectives = OBJECTIVES if recipe.objective in OBJECTIVES else find_world().objectives
    made: Objective = objectives[recipe.objective](recipe)
    return made
