"""Objectives: what a run learns. The training loop uses only the interface `Objective`."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import EvalPrediction

from omni.training.alignment import Alignment
from omni.training.answers import AnswerTraining
from omni.training.classification import Classification
from omni.training.contrastive import ContrastiveAlignment
from omni.training.distillation import Distillation
from omni.training.recipe import Recipe
from omni.training.transcription import Transcription
from omni.worlds import find_world


class Objective(Protocol):
    """The interface of an objective.

    Attributes:
        model: returns a `loss` in its forward.
        processor: saved in each checkpoint of the run.
        train, evaluate: the examples; `evaluate` may be None.
        collate: makes a batch of a list of examples.
    """

    model: nn.Module
    processor: Any
    train: Any
    evaluate: Any
    collate: Any

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Reduce the outputs of an evaluation step to what `metrics` needs."""

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The scores of an evaluation by name."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the finished checkpoint."""


OBJECTIVES: dict[str, type[Any]] = {
    "contrastive": ContrastiveAlignment,
    "answers": AnswerTraining,
    "distillation": Distillation,
    "transcription": Transcription,
    "alignment": Alignment,
    "classification": Classification,
}


def make_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe: one of `OBJECTIVES`, or one that belongs to a world."""
    objectives = OBJECTIVES if recipe.objective in OBJECTIVES else find_world().objectives
    made: Objective = objectives[recipe.objective](recipe)
    return made
