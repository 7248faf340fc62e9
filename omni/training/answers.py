"""Next-token prediction on answers: a fused model learns to answer questions about items."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EvalPrediction

from omni.data.collate import IGNORED, ConversationCollator, expect_taken
from omni.data.conversations import Example
from omni.data.manifests import ManifestConversations
from omni.training.adapters import note_base
from omni.training.cache import FrozenTower, TokenCache
from omni.training.fused import build_omni
from omni.training.order import Mixed, mix
from omni.training.parts import resting_towers
from omni.training.pixels import cross_as_bytes
from omni.training.recipe import Recipe
from omni.training.sections import Drawn, Files, Mixture, OmniSection, sources_of
from omni.training.unseen import UnseenTokens, loss_without_unseen

MOST_ROWS = 20_000
"""The largest number of the user's rows that are read to train the tokenizer of a new Thinker."""

SOME, SHORT = 50, 2
"""The number of examples whose answers are measured, and the largest number of words of a short answer."""

FIRST_ROWS = 1000
"""The largest number of the user's rows that are inspected before the first step."""


class AnswerTraining:
    """The objective "answers": next-token prediction on the answers of conversations."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, OmniSection)
        self.model, self.processor = build_omni(**recipe.model.model_dump(), texts=texts(recipe.train))
        positions = getattr(self.model.config.text_config, "max_position_embeddings", None)
        options = cross_as_bytes(self.model.model, self.processor.preprocessors)
        self._collate = ConversationCollator(self.processor, max_positions=positions, options=options)
        self._unseen = UnseenTokens(self.processor.tokenizer)
        self.model.loss_function = loss_without_unseen
        resting = resting_towers(self.model, recipe)
        self.train, self.evaluate = (self._examples(data, resting) for data in (recipe.train, recipe.evaluate))
        if recipe.lora and recipe.objective == "answers":
            _warn_of_short_answers(self.train)
        if recipe.model.checkpoint and not recipe.lora:
            _warn_of_forgetting(recipe)
        self.processor.prompt = _question(self.train)
        self.processor.asked_by = _asked_by(recipe.train, self.train) or self.processor.asked_by

    def _examples(self, data: Drawn | Files | Mixture | None, resting: Sequence[str]) -> Any:
        """The examples. With a cache, items come encoded if their modality's tower is not trained (`resting`)."""
        if isinstance(data, Mixture):
            return mix(data, lambda part: self._examples(part, resting))
        if not isinstance(data, Files):
            return conversations(data)
        caches = {name: self._cache(name, data) for name in resting} if data.cache else {}
        examples = ManifestConversations(data.manifest(), {name: cache.encode for name, cache in caches.items()})
        for row in islice(examples.manifest, FIRST_ROWS):
            expect_taken(row.source, [file.modality for file in row.files], self.processor.preprocessors)
        return examples

    def _cache(self, name: str, data: Files) -> TokenCache:
        # a copy, which stays on the CPU, in float32 and in eval mode, in every worker that reads files
        tower = copy.deepcopy(getattr(self.model.model, f"{name}_tower")).float().eval()
        frozen = FrozenTower(name, self.model.config.modalities[name], tower, self.processor.preprocessors[name])
        assert data.cache is not None
        return TokenCache(data.cache, frozen, round(data.cache_gigabytes * 1e9))

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch of `ConversationCollator`, with `logits_to_keep` bool[B, L]: true at tokens before a label.

        If an example has unseen words, `unseen` int64[B, L] holds their tokens.
        """
        batch = self._collate(examples)
        batch["logits_to_keep"] = before_labels(batch["labels"])
        if any(example.unseen for example in examples):
            batch["unseen"] = self._unseen(batch["labels"], examples)
        return batch

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Logits float[n, V] -> int64[B, L], see `predicted`."""
        return predicted(logits[0] if isinstance(logits, tuple) else logits, labels)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of answers whose tokens are all predicted right, and that of the best constant answer."""
        answers = [right for row in np.asarray(prediction.predictions) for right in right_answers(row)]
        said = Counter(answer for row in np.asarray(prediction.label_ids) for answer in spoken(row))
        constant = max(said.values(), default=0)
        return {
            name: n / max(len(answers), 1) for name, n in (("exact_match", sum(answers)), ("best_constant", constant))
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the fused model, or its adapters, and the processor."""
        config: Any = model.config
        vars(config).pop("use_cache", None)  # a setting of `Trainer`
        model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel or a PeftModel
        note_base(model, folder)
        self.processor.save_pretrained(folder)


def _warn_of_short_answers(examples: Any) -> None:
    """Warn if most answers are short, because adapters then teach the language model to write only short ones."""
    some = [examples[index] for index in range(0, len(examples), max(1, len(examples) // SOME))]
    said = [message["content"] for example in some for chat in example.conversations for message in chat[1::2]]
    words = median(len("".join(block["text"] for block in content).split()) for content in said)
    if words <= SHORT and all(any(example.items.values()) for example in some):
        warnings.warn(
            f"The language model learns from short answers (in words, median: {words:g}), and may then give no others; mix "
            "in rows of text, or train the projector alone.",
            stacklevel=2,
        )


def _warn_of_forgetting(recipe: Recipe) -> None:
    """Warn if the language model of a checkpoint learns from the user's rows alone."""
    sources = sources_of(recipe.train)
    learns = not any(re.search(pattern, "model.language_model.layers.0") for pattern in recipe.freeze)
    if learns and all(isinstance(data, Files) for data in sources) and len(sources) == 1:
        warnings.warn(
            "The language model learns from these rows alone, so questions that it answered before may be forgotten; to "
            "keep them, mix in rows or scenes of that kind (docs/training.md, What is forgotten).",
            stacklevel=2,
        )


def before_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels int64[B, L] -> bool[B, L]: true at the tokens before a label."""
    return F.pad(labels[:, 1:] != IGNORED, (0, 1))


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether labels are predicted: int64[B, L] with 1 or 0 at each label, IGNORED elsewhere.

    Args:
        logits: float[n, V], at the n tokens before a label.
        labels: int64[B, L].
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    right = torch.full_like(labels, IGNORED)
    right[following != IGNORED] = (logits.argmax(-1) == following[following != IGNORED]).long()
    return right


def right_answers(row: Any) -> list[bool]:
    """For each answer in a row of `predicted`, int64[L], whether all of its tokens are right."""
    return [all(answer) for answer in spoken(row)]


def spoken(row: Any) -> list[tuple[int, ...]]:
    """The answers in a row of labels, int64[L]: the runs of tokens between those that are `IGNORED`."""
    row = np.asarray(row)
    ends = np.flatnonzero(np.diff((row != IGNORED).astype(int), prepend=0, append=0))
    return [tuple(row[start:end].tolist()) for start, end in ends.reshape(-1, 2)]


def _question(examples: Any) -> str | None:
    """The first question of more than half of the user's first rows; None if there is no such question."""
    asked = list[str]()
    for part in examples.parts if isinstance(examples, Mixed) else [examples]:
        for row in islice(part.manifest, FIRST_ROWS) if isinstance(part, ManifestConversations) else ():
            asked.append("".join(block.get("text", "") for block in row.conversation[0]["content"]).strip())
    question, count = Counter(asked).most_common(1)[0] if asked else ("", 0)
    return question if question and 2 * count > len(asked) else None


def _asked_by(data: Drawn | Files | Mixture, examples: Any) -> list[str]:
    """The modalities that have an item in every message without words. Of files, the first rows are inspected."""
    wordless = list[set[str]]()
    for source, part in zip(
        sources_of(data), examples.parts if isinstance(examples, Mixed) else [examples], strict=True
    ):
        if isinstance(source, Drawn):
            wordless += [{*names}] if (names := source.asked_by()) else []
            continue
        messages = [message for row in islice(part.manifest, FIRST_ROWS) for message in row.conversation]
        for content in (message["content"] for message in messages if message["role"] == "user"):
            if not any(block.get("text", "").strip() for block in content):
                wordless.append({block["type"] for block in content})
    return sorted(set.intersection(*wordless)) if wordless else []


def conversations(data: Drawn | Files | Mixture | None) -> Any:
    """A sequence of examples, from files, from a world, or from a mixture; None for None."""
    if isinstance(data, Mixture):
        return mix(data, conversations)
    return ManifestConversations(data.manifest()) if isinstance(data, Files) else data and data.conversations()


def texts(data: Drawn | Files | Mixture) -> Iterator[str]:
    """Questions and answers in the data. Of files, the first `MOST_ROWS` rows are read."""
    for source in sources_of(data):
        if isinstance(source, Drawn):
            yield from source.texts()
            continue
        for row in islice(source.manifest(), MOST_ROWS):
            for message in row.conversation:
                yield from (block["text"] for block in message["content"] if block["type"] == "text")
