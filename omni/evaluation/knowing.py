"""Whether a model knows what it does not know: is it as sure as it is right, and does it recognise strangers?

Strangers are items and questions unlike training: a folder, rows, or a file with a question in each line. The model's
checkpoint judges them (`omni.knowing`) and the questions of the evaluation, and the two are compared.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from omni.data.conversations import words_of
from omni.data.manifests import Manifest
from omni.data.sources import ManifestError
from omni.items import read_item, suffixes
from omni.knowing.statistics import Gist, Statistic, gist, words
from omni.registry import get_modality

from .asking import Questionnaire
from .scores import Asked, EvaluationError

BINS = 15
MOST = 1000
"""Examples of the evaluation that strangers are compared with, at most."""
BATCH = 16


class Reliability(BaseModel):
    """Whether answers are right as often as the model is sure.

    Attributes:
        n: number of answers.
        error: expected calibration error: the mean distance of confidence and accuracy, over `BINS` bins of equal size.
        confidence, accuracy: the means over all answers.
        bins: (mean confidence, accuracy, number of answers) of each bin.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n: int
    error: float
    confidence: float
    accuracy: float
    bins: list[tuple[float, float, int]]


class Strangers(BaseModel):
    """How well a model tells strangers from the items or questions of the evaluation.

    Attributes:
        kind: the noun of their modality, or "question".
        group: the folder that they are in; empty for all of a kind.
        n: how many.
        area: under the ROC curve: the chance that a stranger is farther from training than something of the evaluation.
        found: share of them that is called unlike training.
        false_alarms: share of the evaluation that is.
        alike: number of items or questions of the evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    group: str
    n: int
    area: float
    found: float
    false_alarms: float
    alike: int


def reliability(asked: Iterable[Asked]) -> Reliability | None:
    """The reliability of answers; None if the model does not know how sure it is."""
    known = sorted((each.confidence, each.right) for each in asked if each.confidence is not None)
    if not known:
        return None
    bins = [part for part in np.array_split(np.array(known, dtype=float), BINS) if len(part)]
    means = [(float(part[:, 0].mean()), float(part[:, 1].mean()), len(part)) for part in bins]
    error = sum(abs(sure - right) * n for sure, right, n in means) / len(known)
    confidence, accuracy = (float(mean) for mean in np.array(known, dtype=float).mean(0))
    return Reliability(n=len(known), error=error, confidence=confidence, accuracy=accuracy, bins=means)


def area_under_roc(alike: Sequence[float], strange: Sequence[float]) -> float:
    """The chance that one of `strange` is larger than one of `alike`; equal ones count half (Mann and Whitney 1947)."""
    ordered = np.sort(np.array(alike))
    below, upto = (np.searchsorted(ordered, strange, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(ordered))


class _One(NamedTuple):
    """An item of a modality, or a question."""

    modality: str | None
    value: Any
    group: str = ""


def find_strangers(
    model: Any,
    processor: Any,
    questionnaire: Questionnaire,
    path: str,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Strangers]:
    """Compare strangers with the examples of an evaluation.

    Args:
        model, processor: see `omni.loading.checkpoint.load`.
        questionnaire: the examples.
        path: the strangers: a folder of files, where the folders in it are groups; a .txt file with a question in each
            line; or rows, see `omni.data.manifests`.
        progress: called with the number of examples of the evaluation that were looked at.

    Raises:
        EvaluationError: the checkpoint does not know what training was like, or there are no strangers to compare with it.
        ManifestError, ItemError: rows or a file that cannot be read.
    """
    known = model.familiarity
    if known is None:
        raise EvaluationError(
            "The checkpoint does not say what it was trained on, so it cannot recognise strangers; run `omni checkpoint "
            "familiarise` on it first."
        )
    statistics: dict[str | None, Statistic] = {**known.items, **({None: known.question} if known.question else {})}
    strange = [each for each in _strangers(path) if each.modality in statistics]
    if not strange:
        raise EvaluationError(
            f"In {path!r} there is nothing that the checkpoint can compare with training; name others."
        )
    wanted = {each.modality for each in strange}
    count, total = min(MOST, len(questionnaire)), len(questionnaire)

    def alike() -> Iterator[_One]:
        for number in range(count):
            example = questionnaire[number * total // count]
            yield from (_One(name, item) for name, items in example.items.items() for item in items)
            yield from (_One(None, query.text) for query in example.queries)
            progress(number + 1)

    def distances(many: Iterable[_One]) -> dict[tuple[str | None, str], list[float]]:
        found: dict[tuple[str | None, str], list[float]] = {}
        told = (each for each in many if each.modality in wanted)
        for one, what in _seen(model, processor, told):
            for group in {one.group, ""}:
                found.setdefault((one.modality, group), []).append(statistics[one.modality].distance(what))
        return found

    near, far = distances(alike()), distances(strange)
    result = []
    for (modality, group), distance in far.items():
        usual, statistic = near.get((modality, "")), statistics[modality]
        noun = "question" if modality is None else get_modality(modality).noun
        if usual is None:
            raise EvaluationError(f"The evaluation has no {noun} that those in {path!r} could be compared with.")
        limit = statistic.limit
        result.append(
            Strangers(
                kind=noun,
                group=group,
                n=len(distance),
                area=area_under_roc(usual, distance),
                found=float((np.array(distance) > limit).mean()),
                false_alarms=float((np.array(usual) > limit).mean()),
                alike=len(usual),
            )
        )
    return sorted(result, key=lambda each: (each.kind, each.group))


def _strangers(path: str) -> Iterator[_One]:
    place = Path(path)
    if place.is_dir():
        for file in sorted(each for each in place.rglob("*") if each.suffix.lower() in suffixes()):
            item = read_item(str(file))
            group = file.relative_to(place).parts[0] if file.parent != place else ""
            yield _One(item.modality, item.value, group)
    elif place.suffix.lower() == ".txt":
        try:
            lines = place.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ManifestError(f"{path!r} cannot be read ({error}); expected a question in each line.") from error
        yield from (_One(None, line) for line in lines if line.strip())
    else:
        for row in Manifest.read(place, answers=False):
            for name, items in row.open().items():
                yield from (_One(name, item) for item in items)
            yield from (_One(None, words_of(turn)) for turn in row.conversation if turn["role"] == "user")


def _seen(model: Any, processor: Any, many: Iterable[_One]) -> Iterator[tuple[_One, Gist | list[int]]]:
    """Each with the input of its statistic: an item's gist, a question's tokens. Questions without words are left out."""
    waiting: dict[str, list[_One]] = {}
    for one in many:
        if one.modality is None:
            if tokens := words(processor.tokenizer, one.value):
                yield one, tokens
            continue
        batch = waiting.setdefault(one.modality, [])
        batch.append(one)
        if len(batch) == BATCH:
            yield from _encoded(model, processor, batch)
            batch.clear()
    for batch in waiting.values():
        if batch:
            yield from _encoded(model, processor, batch)


def _encoded(model: Any, processor: Any, batch: Sequence[_One]) -> Iterator[tuple[_One, Gist]]:
    name = batch[0].modality
    assert name is not None
    with torch.inference_mode():
        inputs = processor(**{get_modality(name).argument: [one.value for one in batch]}, return_tensors="pt")
        items = model.model.encode_items(name, **inputs.to(model.device))
    yield from ((one, gist(item.tokens)) for one, item in zip(batch, items, strict=True))
