"""The probability that a greedy answer is right, from the probabilities of its tokens.

Models are over- or underconfident. So the probability is calibrated on held-out rows (Platt 1999).
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
    """A logits processor for greedy `generate` that records the log-probability of each token that is written."""

    def __init__(self) -> None:
        self._steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Record the scores float[B, V], and return them unchanged."""
        self._steps.append(scores.log_softmax(-1).amax(-1))
        return scores

    def of(self, written: torch.Tensor, ends: Any) -> list[list[float]]:
        """For each answer, the log-probabilities of its tokens, up to the one that ends it.

        Args:
            written: int64[B, n], the answers, padded after their ends.
            ends: the end-of-text token or tokens, as in a generation config.
        """
        stops = {*ends} if isinstance(ends, list) else {ends}
        rows = torch.stack(self._steps, 1).tolist()
        return [
            row[: next((place for place, token in enumerate(tokens, start=1) if token in stops), len(tokens))]
            for row, tokens in zip(rows, written.tolist(), strict=True)
        ]


class Calibration(BaseModel):
    """The probability that an answer is right: sigmoid(slope x + offset), where x is the log-odds of the whole answer.

    With slope 1 and offset 0 it is the model's own probability of the answer.

    Attributes:
        slope, offset: fitted on held-out answers.
        answers: number of held-out answers.
        right: share of them that were right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    slope: float
    offset: float
    answers: int
    right: float

    @classmethod
    def fit(cls, logprobs: Sequence[Sequence[float]], right: Sequence[bool]) -> Self:
        """Fit by Newton's method on the likelihood, with a prior at slope 1 and offset 0 that weighs as one or two answers.

        Args:
            logprobs: the log-probabilities of the tokens of each answer.
            right: whether each answer is right.
        """
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
        """The probability that an answer is right, from the log-probabilities of its tokens."""
        return float(_sigmoid(np.array(self.slope * _evidence(logprobs) + self.offset)))


def _evidence(logprobs: Sequence[float]) -> float:
    """The log-odds of an answer, limited to probabilities that float32 can tell from 0 and 1."""
    together = min(max(sum(logprobs), -16.0), -1e-7)
    return together - math.log(-math.expm1(together))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
