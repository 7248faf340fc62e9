"""Measure what training was like, and write it into the checkpoint: `familiarity.json`, which `omni.knowing` reads.

rows of training ──▶ what the encoders say of their items, the words of their questions ──▶ spread, wording
held-out rows    ──▶ the same ──▶ thresholds; the model's answers, right or wrong ──▶ calibration
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni.data.conversations import Example, Message, with_items, words_of
from omni.fusion import acceleration
from omni.fusion.encoded_item import EncodedItem
from omni.knowing.confidence import Calibration, Certainty
from omni.knowing.familiarity import Familiarity
from omni.knowing.statistics import FEWEST, Spread, Wording, vector, words
from omni.loading.checkpoint import load
from omni.questions import write_prompts

ROWS = 1000
"""Rows of training that are looked at, and as many held-out ones, spread over all that there are."""
ANSWERS = 1000
"""Held-out questions that are answered, at most."""
BATCH = 16
LONGEST = 192
"""Tokens of an answer, as `omni ask` writes them."""

Progress = Callable[[str, int, int], None]


def familiarise(
    checkpoint: str | Path,
    train: Any,
    held_out: Any = None,
    rows: int = ROWS,
    device: Any = None,
    progress: Progress = lambda label, done, total: None,
) -> Familiarity | None:
    """Measure what training was like, and write it into the folder of a fused model.

    Args:
        checkpoint: the folder.
        train: rows that the model was trained on, a sequence of `Example`s.
        held_out: rows like these that it was not trained on. Without them a fifth of `train` gives the thresholds, and how
            sure an answer is stays unknown.
        rows: how many to look at, of each.
        device: where the model computes; by default on the CPU.
        progress: called with the name of a step, the number done, and the total number.

    Returns:
        What was written; None if there are fewer rows than `FEWEST`, and so nothing is known and written.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        ManifestError, ItemError: a row or a file that cannot be read.
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
    Familiarity.remove(folder)  # it may be of other weights
    model, processor = load(folder)
    model.to(device or "cpu")
    fitted = _look(model, processor, train, seen, 0, lambda done: progress("rows of training", done, len(seen)))
    found = _look(model, processor, held_out, others, answers, lambda done: progress("held-out", done, len(others)))
    spreads = {
        name: Spread.fit(np.stack(vectors)).with_threshold(found.vectors[name])
        for name, vectors in fitted.vectors.items()
        if len(vectors) >= FEWEST and name in found.vectors
    }
    wording = None
    if len(fitted.questions) >= FEWEST and found.questions:
        wording = Wording.fit(fitted.questions).with_threshold(found.questions)
    calibration = Calibration.fit(found.logprobs, found.right) if len(found.right) >= FEWEST else None
    familiarity = Familiarity(weights={}, items=spreads, question=wording, calibration=calibration)
    familiarity.write(folder)
    return Familiarity.read(folder)


@dataclass
class _Found:
    """What was found in some rows: items as vectors by modality, questions as tokens, and of each answer how likely its
    tokens are and whether it is right."""

    vectors: dict[str, list[Any]] = field(default_factory=dict)
    questions: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def _spaced(examples: Any, count: int) -> list[int]:
    """So many places at most, the same distance apart."""
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
    """What is in the rows at these places; `answers`: how many questions are answered, at most."""
    found = _Found()
    each = -(-answers // len(places))  # of one row, so that all rows are asked about
    waiting: list[tuple[list[Message], str]] = []
    for start in range(0, len(places), BATCH):
        batch = [examples[place] for place in places[start : start + BATCH]]
        for example, items in zip(batch, _encode(model, processor, batch), strict=True):
            for name, encoded in items.items():
                found.vectors.setdefault(name, []).extend(vector(item.tokens) for item in encoded)
            asked = list(_questions(example))
            found.questions += [
                tokens for chat, _ in asked if (tokens := words(processor.tokenizer, words_of(chat[-1])))
            ]
            waiting += [(with_items(chat, items), expected) for chat, expected in asked[:each]]
        while len(waiting) >= BATCH or (waiting and start + BATCH >= len(places)):
            _answer(model, processor, waiting[:BATCH], found)
            del waiting[:BATCH]
        progress(min(start + BATCH, len(places)))
    return found


@torch.inference_mode()
def _encode(model: Any, processor: Any, batch: Sequence[Example]) -> list[dict[str, list[EncodedItem]]]:
    """The items of each row, encoded."""
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
    """Each question of a row with what comes before it, and its answer."""
    for conversation in example.conversations:
        for turn, message in enumerate(conversation):
            if message["role"] == "assistant":
                yield conversation[:turn], words_of(message)


@torch.inference_mode()
def _answer(model: Any, processor: Any, asked: Sequence[tuple[list[Message], str]], found: _Found) -> None:
    """Have the model answer, and note how likely the tokens are and whether the answer is right."""
    inputs = write_prompts(processor, [chat for chat, _ in asked]).to(model.device)
    certainty = Certainty()
    output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False, logits_processor=[certainty])
    written = output[:, inputs["input_ids"].shape[1] :]
    found.logprobs += certainty.of(written, model.generation_config.eos_token_id)
    texts = processor.batch_decode(written, skip_special_tokens=True)
    found.right += [text.strip() == expected for text, (_, expected) in zip(texts, asked, strict=True)]
