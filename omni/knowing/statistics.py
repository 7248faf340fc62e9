"""What items and questions of training are like, in a few numbers; what is far from them is a stranger.

Shapes: N rows, D width of an encoder, R directions in which its tokens vary most.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

FEWEST = 50
"""Rows, at least; of fewer nothing can be said."""
FALSE_ALARMS = 0.05
"""Share of rows like those of training that are taken for strangers."""
DIRECTIONS, NUMBERS = 32, 12_288
"""R at most; and R x D at most, of wide encoders, though R is never below 8."""
MOST_PAIRS = 10_000
"""Pairs of tokens that are kept, the most frequent ones."""
START, END = -1, -2

Floats = NDArray[np.float64]


class Statistic(BaseModel):
    """One of the two below. `threshold` is the distance that `FALSE_ALARMS` of held-out rows are beyond."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.0, ge=0)

    def distance(self, one: Any) -> float:
        """How far this is from what training had."""
        raise NotImplementedError

    @property
    def limit(self) -> float:
        """What is beyond is a stranger. The threshold itself is not, however it is rounded."""
        return self.threshold * (1 + 1e-4)

    def knows(self, one: Any) -> bool:
        """Whether this is like what training had."""
        return self.distance(one) <= self.limit

    def with_threshold(self, held_out: Iterable[Any]) -> Self:
        """The same with a threshold by these, which it was not fitted on."""
        distances = [self.distance(one) for one in held_out]
        return self.model_copy(update={"threshold": _short(np.quantile(distances, 1 - FALSE_ALARMS))})


class Spread(Statistic):
    """Mean and covariance of vectors: R directions with their variances, and one variance for all other directions.

    Attributes:
        mean: float[D].
        directions: float[R, D], orthonormal.
        variances: float[R].
        rest: variance in each direction beside them.
    """

    mean: list[float]
    directions: list[list[float]]
    variances: list[float]
    rest: float

    @classmethod
    def fit(cls, vectors: Floats) -> Self:
        """The spread of float[N, D]."""
        count, width = vectors.shape
        mean = vectors.mean(0)
        _, scales, directions = np.linalg.svd(vectors - mean, full_matrices=False)
        variances = scales**2 / (count - 1)
        least = 1e-3 * variances.sum() / width + 1e-12  # numbers of training that never vary may vary a little
        kept = min(DIRECTIONS, max(8, NUMBERS // width), count // 10, width - 1)
        return cls(
            mean=[_short(each) for each in mean],
            directions=[[_short(each) for each in row] for row in directions[:kept]],
            variances=[_short(each + least) for each in variances[:kept]],
            rest=_short(variances[kept:].sum() / (width - kept) + least),
        )

    def distance(self, one: Floats) -> float:
        """Mahalanobis' distance of float[D], squared."""
        mean, directions, variances = self._arrays
        away = one - mean
        along = directions @ away
        beside = max(float(away @ away - along @ along), 0.0)
        return float((along**2 / variances).sum() + beside / self.rest)

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        return np.array(self.mean), np.array(self.directions).reshape(-1, len(self.mean)), np.array(self.variances)


class Wording(Statistic):
    """Which token follows which in the questions of training; the distance is the mean surprise of a token, in nats.

    Attributes:
        pairs: (token, the next one, how often).
    """

    pairs: list[tuple[int, int, int]]

    @classmethod
    def fit(cls, questions: Iterable[Sequence[int]]) -> Self:
        """The wording of questions, each as its tokens."""
        counts = Counter(pair for question in questions for pair in _pairs(question))
        return cls(pairs=[(one, after, count) for (one, after), count in counts.most_common(MOST_PAIRS)])

    def distance(self, one: Sequence[int]) -> float:
        """Mean surprise. Of a pair that was never seen, as the next token alone; of that (Witten and Bell 1991), as one."""
        pairs, follow, alone = self._counts
        total, kinds = alone.total(), len(alone) + 1
        surprise = 0.0
        for before, after in (asked := _pairs(one)):
            after_any = (alone[after] + 0.1) / (total + 0.1 * kinds)
            often, different = follow[before]
            seen = pairs[before, after]
            surprise -= math.log((seen + different * after_any) / (often + different) if often else after_any)
        return surprise / len(asked)

    @cached_property
    def _counts(self) -> tuple[Counter[tuple[int, int]], Mapping[int, tuple[int, int]], Counter[int]]:
        pairs: Counter[tuple[int, int]] = Counter()
        follow: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
        alone: Counter[int] = Counter()
        for one, after, count in self.pairs:
            pairs[one, after] = count
            follow[one] = follow[one][0] + count, follow[one][1] + 1
            alone[after] += count
        return pairs, follow, alone


def vector(tokens: Mapping[str, Any]) -> Floats:
    """An encoded item as float[D]: its `cls`, or the mean of its `grid`."""
    found = tokens["cls"] if "cls" in tokens else tokens["grid"]
    found = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else found
    mean: Floats = np.asarray(found, dtype=np.float64).mean(0)
    return mean


def words(tokenizer: Any, question: str) -> list[int]:
    """The tokens of a question in small letters and without punctuation; none where nothing is asked in words."""
    plain = " ".join(re.sub(r"[^\w\s]+", " ", question.casefold()).split())
    return list(tokenizer(plain, add_special_tokens=False)["input_ids"]) if plain else []


def _pairs(question: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([START, *question], [*question, END], strict=True))


def _short(number: Any) -> float:
    """To five digits, as a file keeps it."""
    return float(f"{float(number):.5g}")
