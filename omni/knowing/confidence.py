"""How sure a greedy answer is: the probability that it is right, from those of its tokens.

A model is surer than it is right, or less sure. So what its tokens say is calibrated on held-out rows (Platt 1999).
"""

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from transformers import LogitsProcessor


class Certainty(LogitsProcessor):
    """Among the logits processors of a greedy `generate`, it notes how likely each token is that is written."""

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores float[B, V], which stay as they are."""
        self._steps.append(scores.log_softmax(-1).amax(-1))
        return scores

    def of(self, written: torch.Tensor, ends: Any) -> list[list[float]]:
        """For each answer the logarithms of the probabilities of its tokens, with the one that ends it.

        Args:
            written: int64[B, n], the answers, padded after their ends.
            ends: the token or tokens that end an answer, as a generation config has them.
        """
        stops = {*ends} if isinstance(ends, list) else {ends}
        rows = torch.stack(self._steps, 1).tolist()
        return [
            row[: next((place for place, token in enumerate(tokens, start=1) if token in stops), len(tokens))]
            for row, tokens in zip(rows, written.tolist(), strict=True)
        ]


class Calibration(BaseModel):
    """The probability that an answer is right: sigmoid(slope x + offset), x the log-odds of all of its tokens together.

    With slope 1 and offset 0 it is the model's own probability of the answer.

    Attributes:
        slope, offset: fitted on held-out answers.
        answers: how many they were.
        right: share of them that was right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: float
    offset: float
    answers: int
    right: float

    @classmethod
    def fit(cls, logprobs: Sequence[Sequence[float]], right: Sequence[bool]) -> Self:
        """By Newton's method on the likelihood, drawn to slope 1 and offset 0 by as much as one answer or two would."""
        x, hits = np.array([_evidence(each) for each in logprobs]), np.array(right)
        own: NDArray[np.float64] = np.array([1.0, 0.0])
        weights, terms = own.copy(), np.stack([x, np.ones_like(x)], 1)
        for _ in range(100):
            chance = _sigmoid(terms @ weights)
            gradient = terms.T @ (chance - hits) + (weights - own)
            curvature = (terms * (chance * (1 - chance))[:, None]).T @ terms + np.eye(2)
            step = np.linalg.solve(curvature, gradient)
            weights -= step / max(1.0, float(np.abs(step).max()))
            if np.abs(step).max() < 1e-9:
                break
        slope, offset = (float(f"{each:.5g}") for each in weights)
        return cls(slope=slope, offset=offset, answers=len(hits), right=float(f"{hits.mean():.5g}"))

    def confidence(self, logprobs: Sequence[float]) -> float:
        """The probability that an answer with tokens of these log-probabilities is right."""
        return float(_sigmoid(np.array(self.slope * _evidence(logprobs) + self.offset)))


def _evidence(logprobs: Sequence[float]) -> float:
    """The log-odds of an answer, within what float32 can tell from 0 and 1."""
    together = min(max(sum(logprobs), -16.0), -1e-7)
    return together - math.log(-math.expm1(together))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
