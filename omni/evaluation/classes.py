"""Measure a classifier: the class of each row of a manifest, a score for each class, and which classes are confused."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from omni.loading.classifier import Classifier

from .manifest import ManifestQuestions
from .scores import Asked, EvaluationError, wilson_interval

MOST_CONFUSIONS = 100
"""The largest number of confusions that a result keeps."""


class ClassScore(BaseModel):
    """How well the items of one class are told from the others.

    Attributes:
        name: the class.
        n: number of its items.
        recall, low, high: share of its items that are recognised, and the 95 % interval (Wilson score).
        answers: number of items that were said to be of this class.
        precision: share of these that are; None if there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    n: int
    recall: float
    low: float
    high: float
    answers: int
    precision: float | None


class Confusion(BaseModel):
    """Items of one class that were taken for another.

    Attributes:
        expected, answer: the right class, and the one that was said.
        n: number of such items.
        of: number of items of the right class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    expected: str
    answer: str
    n: int
    of: int


def classify_rows(
    classifier: Classifier,
    questions: ManifestQuestions,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Asked]:
    """The class of the item of each row, with the probability that the classifier gives it.

    Raises:
        EvaluationError: a row has no item of the classifier's modality, several, or a class that it does not know.
    """
    asked, names, bundle = list[Asked](), classifier.names, classifier.encoder.bundle
    for start in range(0, len(questions), batch_size):
        places = range(start, min(start + batch_size, len(questions)))
        examples = [questions[place] for place in places]
        for example in examples:
            items = example.items.get(bundle.name, ())
            if len(items) != 1 or len(example.items) != 1:
                found = ", ".join(f"{len(each)} of {name!r}" for name, each in example.items.items()) or "none"
                raise EvaluationError(
                    f"{example.source} has the items {found}; a classifier of {bundle.noun}s takes exactly one."
                )
            if (expected := example.queries[0].expected) not in names:
                raise EvaluationError(
                    f"{example.source} is of the class {expected!r}, which the classifier does not know; its classes are "
                    f"{', '.join(map(repr, names[:20]))}{' and others' if len(names) > 20 else ''}."
                )
        shares = classifier([example.items[bundle.name][0] for example in examples])
        for place, example, (share, number) in zip(places, examples, _best(shares), strict=True):
            query = example.queries[0]
            asked.append(Asked(query.kind, "", query.expected, names[number], example.source, place, confidence=share))
        progress(places.stop)
    return asked


def _best(shares: torch.Tensor) -> Sequence[tuple[float, int]]:
    best = shares.max(-1)
    return list(zip(best.values.tolist(), best.indices.tolist(), strict=True))


def class_scores(asked: Sequence[Asked]) -> list[ClassScore]:
    """The scores of the classes that occur, by name."""
    expected, answers = (Counter(getattr(each, name) for each in asked) for name in ("expected", "answer"))
    right = Counter(each.expected for each in asked if each.right)
    found = []
    for name in sorted({*expected, *answers}):
        low, high = wilson_interval(right[name], expected[name])
        found.append(
            ClassScore(
                name=name,
                n=expected[name],
                recall=right[name] / max(expected[name], 1),
                low=low,
                high=high,
                answers=answers[name],
                precision=right[name] / answers[name] if answers[name] else None,
            )
        )
    return found


def confusions(asked: Sequence[Asked]) -> list[Confusion]:
    """The largest confusions first, `MOST_CONFUSIONS` of them at most."""
    expected: Counter[Any] = Counter(each.expected for each in asked)
    wrong = Counter((each.expected, each.answer) for each in asked if not each.right)
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    return [
        Confusion(expected=pair[0], answer=pair[1], n=n, of=expected[pair[0]]) for pair, n in ordered[:MOST_CONFUSIONS]
    ]
