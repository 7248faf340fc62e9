"""Measures statistics of the training data, and writes them into the checkpoint (`familiarity.json`, see `omni.knowing`).

rows of training ──▶ encoded items, words of questions ──▶ distributions of both
held-out rows    ──▶ encoded items, words of questions ──▶ thresholds; the model's answers, right or wrong ──▶ calibration
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from omni.data.conversations import Example, Message, with_items, words_of
from omni.fusion import acceleration
from omni.fusion.encoded_item import EncodedItem
from omni.knowing.confidence import Calibration, Certainty
from omni.knowing.familiarity import Familiarity
from omni.knowing.statistics import FEWEST, Gist, Spread, Wording, gist, words
from omni.loading.checkpoint import load
from omni.questions import write_prompts

ROWS = 1000
"""The largest number of training rows that are measured, and of held-out rows. They are evenly spaced in the data."""
ANSWERS = 1000
"""The largest number of held-out questions that are answered."""
BATCH = 16
LONGEST = 192
"""The largest number of tokens of an answer, as in `omni ask`."""

Progress = Callable[[str, int, int], None]


def familiarise(
    checkpoint: str | Path,
    train: Any,
    held_out: Any = None,
    rows: int = ROWS,
    device: Any = None,
    progress: Progress = lambda label, done, total: None,
) -> Familiarity | None:
    """Measure statistics of the training data, and write them into the folder of a fused model.

    Args:
        checkpoint: the folder.
        train: rows that the model was trained on, a sequence of `Example`s.
        held_out: similar rows that it was not trained on. Without them, a fifth of `train` gives the thresholds, and there
            is no calibration of answers.
        rows: the largest number of rows to measure, of `train` and of `held_out`.
        device: the model's device; by default the CPU.
        progress: called with the name of a step, the number done, and the total number.

    Returns:
        The document that was written; None if there are fewer rows than `FEWEST`, and nothing is written.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ManifestError, ItemError: a row or a file cannot be read.
    """
    folder = Path(checkpoint)
    seen = _spaced(train, rows)
    others = None if held_out is None else _spaced(held_out, rows)
    if others is None or len(others) < FEWEST:
        others, seen = seen[::5], [place for number, place in enumerate(seen) if number % 5]
        held_out, answers = train, 0
    else:
        answers = ANSWERS
    if min(len(seen), 5 * len(others)) < FEWEST:
        return None
    Familiarity.remove(folder)  # it may belong to other weights
    model, processor = load(folder)
    model.to(device or "cpu")
    fitted = _look(model, processor, train, seen, 0, lambda done: progress("rows of training", done, len(seen)))
    found = _look(model, processor, held_out, others, answers, lambda done: progress("held-out", done, len(others)))
    spreads = {
        name: Spread.fit(_all(kinds)).with_threshold(found.gists[name].values())
        for name, kinds in fitted.gists.items()
        if len(_all(kinds)) >= FEWEST and name in found.gists
    }
    wording, asked = None, _all(fitted.questions)
    if len(asked) >= FEWEST and _all(found.questions):
        wording = Wording.fit(asked).with_threshold(found.questions.values())
    calibration = Calibration.fit(found.logprobs, found.right) if len(found.right) >= FEWEST else None
    familiarity = Familiarity(weights={}, items=spreads, question=wording, calibration=calibration)
    familiarity.write(folder)
    return Familiarity.read(folder)


_Kind = frozenset[str]
"""The modalities of a row."""
T = TypeVar("T")


def _all(kinds: Mapping[_Kind, Sequence[T]]) -> list[T]:
    return [each for kind in kinds.values() for each in kind]


@dataclass
class _Found:
    """Measurements of some rows. Rows are of one kind if they have items of the same modalities.

    Attributes:
        gists: of each modality and kind of row, the first item of each row.
        questions: of each kind of row, the questions as tokens.
        logprobs: the log-probabilities of the tokens of each answer.
        right: whether each answer is right.
    """

    gists: dict[str, dict[_Kind, list[Gist]]] = field(default_factory=dict)
    questions: dict[_Kind, list[list[int]]] = field(default_factory=dict)
    logprobs: list[list[float]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def _spaced(examples: Any, count: int) -> list[int]:
    """At most `count` indices of the examples, evenly spaced."""
    total = len(examples)
    return [number * total // count for number in range(count)] if total > count else list(range(total))


def _look(
    model: Any,
    processor: Any,
    examples: Any,
    places: Sequence[int],
    answers: int,
    progress: Callable[[int], None],
) -> _Found:
    """Measure the rows at these places. At most `answers` of their questions are answered."""
    found = _Found()
    each = -(-answers // len(places))  # questions per row, so that every row is asked about
    waiting: list[tuple[list[Message], str]] = []
    for start in range(0, len(places), BATCH):
        batch = [examples[place] for place in places[start : start + BATCH]]
        for example, items in zip(batch, _encode(model, processor, batch), strict=True):
            kind = frozenset(items)
            for name, encoded in items.items():  # of many items in a row one is enough, so that all rows count alike
                found.gists.setdefault(name, {}).setdefault(kind, []).append(gist(encoded[0].tokens))
            asked = list(_questions(example))
            found.questions.setdefault(kind, []).extend(
                tokens for chat, _ in asked if (tokens := words(processor.tokenizer, words_of(chat[-1])))
            )
            waiting += [(with_items(chat, items), expected) for chat, expected in asked[:each]]
        while len(waiting) >= BATCH or (waiting and start + BATCH >= len(places)):
            _answer(model, processor, waiting[:BATCH], found)
            del waiting[:BATCH]
        progress(min(start + BATCH, len(places)))
    return found


@torch.inference_mode()
def _encode(model: Any, processor: Any, batch: Sequence[Example]) -> list[dict[str, list[EncodedItem]]]:
    """The encoded items of each row, by modality."""
    result: list[dict[str, list[EncodedItem]]] = [{} for _ in batch]
    for bundle in processor.bundles:
        items = [item for example in batch for item in example.items.get(bundle.name, [])]
        raw = [item for item in items if not isinstance(item, EncodedItem)]
        encoded: Iterator[EncodedItem] = iter(())
        if raw:
            inputs = processor(**{bundle.argument: raw}, return_tensors="pt").to(model.device)
            with acceleration.current().encoding():
                encoded = iter(model.model.encode_items(bundle.name, **inputs))
        for example, own in zip(batch, result, strict=True):
            if given := example.items.get(bundle.name):
                own[bundle.name] = [item if isinstance(item, EncodedItem) else next(encoded) for item in given]
    return result


def _questions(example: Example) -> Iterator[tuple[list[Message], str]]:
    """For each answer of a row, the conversation before it and its text."""
    for conversation in example.conversations:
        for turn, message in enumerate(conversation):
            if message["role"] == "assistant":
                yield conversation[:turn], words_of(message)


@torch.inference_mode()
def _answer(model: Any, processor: Any, asked: Sequence[tuple[list[Message], str]], found: _Found) -> None:
    """Have the model answer, and note the probabilities of the tokens and whether each answer is right."""
    inputs = write_prompts(processor, [chat for chat, _ in asked]).to(model.device)
    certainty = Certainty()
    output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, logits_processor=[certainty])
    written = output[:, inputs["input_ids"].shape[1] :]
    found.logprobs += certainty.of(written, model.generation_config.eos_token_id)
    texts = processor.batch_decode(written, skip_special_tokens=True)
    found.right += [text.strip() == expected for text, (_, expected) in zip(texts, asked, strict=True)]
