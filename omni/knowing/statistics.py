"""Statistics of the items and questions of training. An input that is far from them is a stranger.

Shapes: N rows, D width of an encoder, R directions in which its tokens vary most.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

FEWEST = 50
"""The smallest number of rows that is enough for statistics."""
FALSE_ALARMS = 0.05
"""Share of rows like those of training in which the item or the question is taken for a stranger. Each has half of it."""
DIRECTIONS, NUMBERS = 96, 20_000
"""The largest R, and the largest R x D for wide encoders, for which R is at least 8."""
MOST_PAIRS = 10_000
"""The number of pairs of tokens that are kept, the most frequent ones."""
START, END = -1, -2

Floats = NDArray[np.float64]


class Gist(NamedTuple):
    """An encoded item in one vector: the mean float[D] of its tokens, and their number."""

    mean: Floats
    tokens: int


class Statistic(BaseModel):
    """A statistic of the training data. Half of `FALSE_ALARMS` of held-out rows are farther away than `threshold`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold: float = Field(default=0.0, ge=0)

    def distance(self, one: Any) -> float:
        """The distance of an input from the training data."""
        raise NotImplementedError

    @property
    def limit(self) -> float:
        """The threshold with a tolerance for rounding. Anything farther away is a stranger."""
        return self.threshold * (1 + 1e-4)

    def knows(self, one: Any) -> bool:
        """Whether an input is like the training data."""
        return self.distance(one) <= self.limit

    def with_threshold(self, held_out: Iterable[Sequence[Any]]) -> Self:
        """A copy with the threshold that follows from held-out inputs.

        Rows of one kind are often farther away than those of another. So the threshold holds for every kind of at least
        `FEWEST` inputs and for all inputs together.

        Args:
            held_out: the inputs of each kind of rows.
        """
        kinds = [[self.distance(one) for one in kind] for kind in held_out]
        together = [distance for kind in kinds for distance in kind]
        large = [kind for kind in kinds if len(kind) >= FEWEST]
        return self.model_copy(update={"threshold": _short(max(map(_limit, [together, *large])))})


class Spread(Statistic):
    """Mean and covariance of items: R directions with their variances, and one variance for all other directions.

    The mean of few tokens varies more than that of many. So a distance is divided by 1 + few / tokens.

    Attributes:
        mean: float[D].
        directions: float[R, D], orthonormal.
        variances: float[R], the variance in each of these directions.
        rest: the variance in every other direction.
        few: 0 if all items have the same number of tokens, as pictures have.
    """

    mean: list[float]
    directions: list[list[float]]
    variances: list[float]
    rest: float
    few: float = Field(default=0.0, ge=0)

    @classmethod
    def fit(cls, items: Sequence[Gist]) -> Self:
        """Fit N items."""
        vectors = np.stack([item.mean for item in items])
        count, width = vectors.shape
        mean = vectors.mean(0)
        _, scales, directions = np.linalg.svd(vectors - mean, full_matrices=False)
        variances = scales**2 / (count - 1)
        least = 1e-3 * variances.sum() / width + 1e-12  # numbers that are constant in training may still vary a little
        kept = min(DIRECTIONS, max(8, NUMBERS // width), count // 10, width - 1)
        found = cls(
            mean=[_short(each) for each in mean],
            directions=[[_short(each) for each in row] for row in directions[:kept]],
            variances=[_short(each + least) for each in variances[:kept]],
            rest=_short(variances[kept:].sum() / (width - kept) + least),
        )
        share = np.array([1 / item.tokens for item in items])
        if np.ptp(share) == 0:
            return found
        distances = np.array([found.distance(item) for item in items])
        slope, start = np.polyfit(share, distances, 1)  # distances are about start + slope / tokens
        return found.model_copy(update={"few": _short(max(slope, 0.0) / max(start, 0.1 * distances.mean()))})

    def distance(self, one: Gist) -> float:
        """The squared Mahalanobis distance of an item, less where it has few tokens."""
        mean, directions, variances = self._arrays
        away = one.mean - mean
        along = directions @ away
        beside = max(float(away @ away - along @ along), 0.0)
        return float((along**2 / variances).sum() + beside / self.rest) / (1 + self.few / one.tokens)

    @cached_property
    def _arrays(self) -> tuple[Floats, Floats, Floats]:
        return np.array(self.mean), np.array(self.directions).reshape(-1, len(self.mean)), np.array(self.variances)


class Wording(Statistic):
    """A bigram model of the questions of training. The distance is the mean surprise of a token, in nats.

    Attributes:
        pairs: tuples (token, next token, count).
    """

    pairs: list[tuple[int, int, int]]

    @classmethod
    def fit(cls, questions: Iterable[Sequence[int]]) -> Self:
        """Fit questions, each a list of tokens."""
        counts = Counter(pair for question in questions for pair in _pairs(question))
        return cls(pairs=[(one, after, count) for (one, after), count in counts.most_common(MOST_PAIRS)])

    def distance(self, one: Sequence[int]) -> float:
        """Mean surprise of the tokens of a question, with the smoothing of Witten and Bell (1991) for unseen pairs."""
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


def gist(tokens: Mapping[str, Any]) -> Gist:
    """The gist of an encoded item, of its `cls` alone if it has one, else of its `grid`."""
    found = tokens["cls"] if "cls" in tokens else tokens["grid"]
    found = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else found
    return Gist(np.asarray(found, dtype=np.float64).mean(0), len(found))


def words(tokenizer: Any, question: str) -> list[int]:
    """The tokens of a question in lower case and without punctuation; empty if it has no words."""
    plain = " ".join(re.sub(r"[^\w\s]+", " ", question.casefold()).split())
    return list(tokenizer(plain, add_special_tokens=False)["input_ids"]) if plain else []


def _pairs(question: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip([START, *question], [*question, END], strict=True))


def _limit(distances: Sequence[float]) -> float:
    """The distance that a new input exceeds with a chance of half of `FALSE_ALARMS` at most, as far as so few can tell.

    It is the quantile of split conformal prediction (Lei et al. 2018): a new input is as likely to have any rank among them.
    """
    rank = math.ceil((len(distances) + 1) * (1 - FALSE_ALARMS / 2))
    return sorted(distances)[min(rank, len(distances)) - 1]


def _short(number: Any) -> float:
    """Round to five digits, as in the file."""
    return float(f"{float(number):.5g}")
