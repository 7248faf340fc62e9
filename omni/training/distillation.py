"""Distillation: a language model reads in words what an item shows, and so teaches itself to read the item.

    caption, question, answer ─▶ original Thinker ───▶ distribution of each token of the answer ─┐
                                                                                                ├─ divergence
    picture, question, answer ─▶ projector, Thinker ─▶ distribution of each token of the answer ─┘

The model learns to use an item as it uses the words, in its own style: with transcripts of spoken questions, it learns to
answer them as it answers written ones (as in Ultravox). What it does not understand in a caption, it
does not learn to see. Rows of text alone keep adapters from changing how it writes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from omni.data.collate import IGNORED
from omni.data.conversations import Example, ExampleError
from omni.registry import get_modality
from omni.training.answers import AnswerTraining, before_labels
from omni.training.recipe import Recipe


class Distillation(AnswerTraining):
    """The objective "distillation": as "answers", but the targets are the language model's probabilities, given words."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._taught: torch.Tensor | None = None
        self.model.loss_function = self._divergence
        self.model.register_forward_pre_hook(self._teach, with_kwargs=True)

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """As `AnswerTraining.collate`, with `teacher`, a batch of the same conversations in words.

        Raises:
            ExampleError: see `in_words`; or an answer has other tokens after the words than after the item.
        """
        batch: dict[str, Any] = super().collate(examples)
        told = self._collate([in_words(example) for example in examples])
        labels = told.pop("labels")
        if not torch.equal(labels[labels != IGNORED], batch["labels"][batch["labels"] != IGNORED]):
            raise ExampleError(
                f"An answer of {examples[0].source or 'the batch'} begins with other tokens after words than after an item; "
                "use the objective 'answers' with this tokenizer."
            )
        return {**batch, "teacher": {**told, "logits_to_keep": before_labels(labels)}}

    def _teach(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before a forward with a `teacher`, run the model without adapters on the words."""
        told = inputs.pop("teacher", None)
        if told is not None:
            with torch.no_grad(), _without_adapters(model):
                taught = model(**told).logits.float()
            self._taught = taught
        return args, inputs

    def _divergence(
        self, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
    ) -> torch.Tensor:
        """Kullback-Leibler divergence of logits float[n, V] from the teacher's, as a mean over the n tokens."""
        taught, self._taught = self._taught, None
        assert taught is not None
        learnt = F.log_softmax(logits.float(), -1)
        total = F.kl_div(learnt, F.log_softmax(taught, -1), reduction="sum", log_target=True)
        return total / (len(logits) if num_items_in_batch is None else num_items_in_batch)


def in_words(example: Example) -> Example:
    """The same conversations with words in place of items.

    Raises:
        ExampleError: the example has no words for an item.
    """
    for name, items in example.items.items():
        if len(example.words.get(name, ())) != len(items):
            noun = get_modality(name).noun
            raise ExampleError(
                f"{example.source or 'An example'} does not say in words what its {noun} shows, which the objective "
                "'distillation' needs; give the row `words`, or use the objective 'answers'."
            )
    conversations = []
    for conversation in example.conversations:
        waiting = {name: iter(words) for name, words in example.words.items()}
        conversations.append([{**message, "content": _told(message["content"], waiting)} for message in conversation])
    return replace(example, items={}, conversations=conversations)


def _told(content: Any, waiting: dict[str, Iterator[str]]) -> Any:
    """The content of a message as one block of text, with words in place of items."""
    if isinstance(content, str):
        return content
    parts = [block["text"] if block["type"] == "text" else next(waiting[block["type"]]) for block in content]
    return [{"type": "text", "text": "\n".join(part for part in parts if part)}]


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, peft's low-rank adapters in a model are disabled."""
    layers: list[Any] = [module for module in model.modules() if isinstance(getattr(module, "lora_A", None), nn.Module)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
