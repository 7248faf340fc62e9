"""Scores: exact match by kind of question, its uncertainty, and what guessing gets."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

Sight = Literal["real", "blank", "swapped", "noise"]
SIGHTS: tuple[Sight, ...] = ("real", "blank", "swapped", "noise")


class EvaluationError(ValueError):
    """Something that cannot be evaluated as asked; the message says what was found, and what to do."""


class Score(BaseModel):
    """Exact match on the questions of one kind.

    Attributes:
        n: questions asked.
        accuracy, low, high: share of right answers and its 95 % interval (Wilson score).
        constant, constant_answer: what always giving the most frequent answer would score, and that answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    n: int
    accuracy: float
    low: float
    high: float
    constant: float
    constant_answer: str


@dataclass(frozen=True)
class Asked:
    """One question, and what was answered.

    Attributes:
        expected, answer: right if they are equal, to the last character.
        source: where the question comes from, such as "scene 7 of test".
        item: the place of its pictures among all that is asked about.
        complete: whether the model ended by itself, rather than being stopped.
        prompt: sha256 of the tokens that the model read; empty if it read none.
    """

    kind: str
    question: str
    expected: str
    answer: str
    source: str = ""
    item: int = 0
    complete: bool = True
    prompt: str = ""

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.answer == self.expected


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `right` among `n` (Wilson 1927), which holds near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding must not leave the share itself outside


@dataclass(frozen=True)
class Parts:
    """How the answers to one kind of question are scored part by part as well, in a row of its own.

    Attributes:
        of: the kind of question, such as "caption".
        kind: what the row is called, such as "caption_objects".
        right: from an expected and a given answer, for each part of the expected one whether the given one has it.
    """

    of: str
    kind: str
    right: Callable[[str, str], Sequence[bool]]


def score(asked: Iterable[Asked], parts: Parts | None = None) -> list[Score]:
    """Scores by kind, in the order in which the kinds first occur.

    Args:
        asked: questions with their answers.
        parts: which answers are scored part by part as well.
    """
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for item in asked:
        by_kind.setdefault(item.kind, []).append((item.expected, item.answer))
        if parts and item.kind == parts.of and (found := parts.right(item.expected, item.answer)):
            by_kind.setdefault(parts.kind, []).extend(("right", "right" if each else "wrong") for each in found)
    found_scores = []
    for kind, pairs in by_kind.items():
        answer, count = Counter(expected for expected, _ in pairs).most_common(1)[0]
        if parts and kind == parts.kind:
            answer, count = "-", 0
        right = sum(expected == answered for expected, answered in pairs)
        found_scores.append(_score(kind, right, len(pairs), count, answer if len(answer) < 40 else "-"))
    return found_scores


def _score(kind: str, right: int, n: int, constant: int, constant_answer: str) -> Score:
    low, high = wilson_interval(right, n)
    return Score(
        kind=kind,
        n=n,
        accuracy=right / n,
        low=low,
        high=high,
        constant=constant / n,
        constant_answer=constant_answer,
    )


class Evaluation(BaseModel):
    """The scores of one pass over the questions.

    Attributes:
        sight: what was shown in the place of the pictures.
        parts: the row that counts parts of answers, if there is one; the answers are counted in another row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sight: Sight
    scores: list[Score]
    parts: str | None = None

    @classmethod
    def of(cls, asked: Iterable[Asked], sight: Sight = "real", parts: Parts | None = None) -> Self:
        """Count answers; see `score`."""
        return cls(sight=sight, scores=score(asked, parts), parts=parts.kind if parts else None)

    def score(self, kind: str) -> Score:
        """The score of one kind of question."""
        return next(score for score in self.scores if score.kind == kind)

    def overall(self) -> Score:
        """All questions as one kind; its constant answer may differ from kind to kind."""
        counted = [score for score in self.scores if score.kind != self.parts]
        right, constant = (round(sum(s.n * getattr(s, name) for s in counted)) for name in ("accuracy", "constant"))
        return _score("overall", right, sum(s.n for s in counted), constant, "by kind")


# --- The sight test ---------------------------------------------------------------------------------------------------


class SightTest(BaseModel):
    """The same questions with other pictures: what a model that looks cannot answer any more.

    Attributes:
        passed: over all questions, the real pictures beat every other kind beyond the intervals of both.
        overall: the score over all questions, by what was shown; "constant" is that of the best constant answer of
            each kind, taken together.
        scores: by what was shown instead of the real pictures, then by kind of question.
        left_out: what could not be shown, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    overall: dict[Sight, Score]
    scores: dict[Sight, list[Score]]
    left_out: dict[Sight, str]


def uses_the_picture(evaluations: Sequence[Evaluation]) -> bool:
    """The verdict of the sight test on passes of which one is "real"."""
    by_sight = {evaluation.sight: evaluation.overall() for evaluation in evaluations}
    return all(by_sight["real"].low > found.high for sight, found in by_sight.items() if sight != "real")


def sight_test(evaluations: Sequence[Evaluation], left_out: Mapping[Sight, str]) -> SightTest:
    """The outcome of the passes over the same questions, of which one is "real"."""
    return SightTest(
        passed=uses_the_picture(evaluations),
        overall={evaluation.sight: evaluation.overall() for evaluation in evaluations},
        scores={evaluation.sight: evaluation.scores for evaluation in evaluations if evaluation.sight != "real"},
        left_out=dict(left_out),
    )
