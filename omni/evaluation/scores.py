"""Scores: exact match by kind of question, its uncertainty, and the score of the best constant answer."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

Sight = Literal["real", "blank", "swapped", "noise"]
SIGHTS: tuple[Sight, ...] = ("real", "blank", "swapped", "noise")


class EvaluationError(ValueError):
    """The evaluation cannot be done as asked. The message says what was found, and what to do."""


class Score(BaseModel):
    """Exact match on the questions of one kind.

    Attributes:
        kind: the kind of question.
        n: number of questions.
        accuracy, low, high: share of right answers, and its 95 % interval (Wilson score).
        constant, constant_answer: the score of always giving the most frequent answer, and that answer.
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
    """One question with its answer.

    Attributes:
        kind: the kind of question.
        question: its words.
        expected, answer: the expected and the given answer. The answer is right if they are equal.
        source: where the question comes from, such as "scene 7 of test".
        example: index of the example that the question is about.
        complete: whether the answer ended by itself, before it was stopped.
        prompt: sha256 of the tokens that the model read; empty for an encoder.
        confidence: the probability that the answer is right, as the model has it; None where it is not known.
    """

    kind: str
    question: str
    expected: str
    answer: str
    source: str = ""
    example: int = 0
    complete: bool = True
    prompt: str = ""
    confidence: float | None = None

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one."""
        return self.answer == self.expected


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of the share of `right` among `n` (Wilson 1927). It is also correct near 0 and 1."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding must not exclude the share


@dataclass(frozen=True)
class Parts:
    """A second score for the answers to one kind of question, which counts their parts.

    Attributes:
        of: the kind of question, such as "caption".
        kind: the kind of the second score, such as "caption_objects".
        right: takes an expected and a given answer; tells for each part of the expected one if the given one has it.
    """

    of: str
    kind: str
    right: Callable[[str, str], Sequence[bool]]


def score(asked: Iterable[Asked], parts: Parts | None = None) -> list[Score]:
    """Scores by kind, in the order in which the kinds first occur.

    Args:
        asked: questions with their answers.
        parts: the kind of answers that are also scored part by part, if there is one.
    """
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for one in asked:
        by_kind.setdefault(one.kind, []).append((one.expected, one.answer))
        if parts and one.kind == parts.of and (found := parts.right(one.expected, one.answer)):
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
        sight: what was shown.
        scores: the scores by kind of question.
        parts: the kind of score that counts parts of answers, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sight: Sight
    scores: list[Score]
    parts: str | None = None

    @classmethod
    def of(cls, asked: Iterable[Asked], sight: Sight = "real", parts: Parts | None = None) -> Self:
        """The scores of answers; see `score`."""
        return cls(sight=sight, scores=score(asked, parts), parts=parts.kind if parts else None)

    def score(self, kind: str) -> Score:
        """The score of one kind of question."""
        return next(score for score in self.scores if score.kind == kind)

    def overall(self) -> Score:
        """The score over all questions. Its "constant" takes the best constant answer of each kind."""
        counted = [score for score in self.scores if score.kind != self.parts]
        right, constant = (round(sum(s.n * getattr(s, name) for s in counted)) for name in ("accuracy", "constant"))
        return _score("overall", right, sum(s.n for s in counted), constant, "by kind")


# --- The sight test ---------------------------------------------------------------------------------------------------


class SightTest(BaseModel):
    """The scores of the same questions when the items of one modality are blank, swapped with another row's, or noise.

    A model that uses the items cannot answer the questions then. Blank items are grey pictures or silence.

    Attributes:
        passed: whether the interval over all questions with the real items lies above each of the other intervals.
        overall: the score over all questions, by what was shown. Its "constant" takes the best constant answer of each
            kind.
        scores: the scores by kind of question, by what was shown; without the real items.
        left_out: what could not be shown, and why.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passed: bool
    overall: dict[Sight, Score]
    scores: dict[Sight, list[Score]]
    left_out: dict[Sight, str]


def uses_the_items(evaluations: Sequence[Evaluation]) -> bool:
    """The verdict of the sight test. One of the evaluations is with the "real" items."""
    by_sight = {evaluation.sight: evaluation.overall() for evaluation in evaluations}
    return all(by_sight["real"].low > found.high for sight, found in by_sight.items() if sight != "real")


def sight_test(evaluations: Sequence[Evaluation], left_out: Mapping[Sight, str]) -> SightTest:
    """The sight test of evaluations on the same questions. One of them is with the "real" items."""
    return SightTest(
        passed=uses_the_items(evaluations),
        overall={evaluation.sight: evaluation.overall() for evaluation in evaluations},
        scores={evaluation.sight: evaluation.scores for evaluation in evaluations if evaluation.sight != "real"},
        left_out=dict(left_out),
    )
