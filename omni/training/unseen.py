"""A loss that does not teach that unseen pairs are impossible.

Some pairs of a shape and a colour are held out of training. From the others a model would learn that nothing cyan is a
hexagon, and then fail on a cyan hexagon. So where the answer could not have been "hexagon" because the object is cyan, the
logit of "hexagon" is left out of the softmax. This is logit adjustment (Menon et al. 2021) with the frequencies of the
training pairs, as in `DenseModel`. No held-out pair is shown or named.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from omni.data.collate import IGNORED
from omni.data.conversations import Example

logger = logging.get_logger(__name__)


class UnseenTokens:
    """Finds the tokens of `Example.unseen` in a batch. Of a word with several tokens, it is the first."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, labels: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """int64[B, L]: at each label, the token that is left out of its softmax, or -100.

        Args:
            labels: int64[B, L]; each answer ends with an end-of-text token.
            examples: the B examples.
        """
        found = torch.full_like(labels, IGNORED)
        for row, spoken, example in zip(found, labels.tolist(), examples, strict=True):
            answers = zip(_runs(spoken), _answers(example), example.unseen, strict=True) if example.unseen else ()
            for (start, stop), answer, unseen in answers:
                if not any(unseen):
                    continue
                for place, token in self._in_answer(spoken[start:stop], answer, unseen):
                    row[start + place] = token
        return found

    def _in_answer(self, ids: list[int], answer: str, unseen: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Positions within the tokens of an answer, and the token to leave out at each."""
        place = 0
        for number, (word, other) in enumerate(zip(answer.split(), unseen, strict=True)):
            space = " " if number else ""
            tokens = self._tokens(space + word)
            if ids[place : place + len(tokens)] != tokens:
                logger.warning_once(
                    f"This tokenizer does not split {answer!r} at its spaces, so the loss counts against pairs of shape "
                    "and colour that are held out."
                )
                return
            if other and (first := self._tokens(space + other)[0]) != tokens[0]:
                yield place, first
            place += len(tokens)

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


def _answers(example: Example) -> list[str]:
    """The texts of all answers of an example, in order."""
    said = [message for chat in example.conversations for message in chat if message["role"] == "assistant"]
    return [message["content"][0]["text"] for message in said]


def _runs(labels: list[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each run of labelled tokens."""
    start = None
    for place, label in enumerate([*labels, IGNORED]):
        if label != IGNORED and start is None:
            start = place
        elif label == IGNORED and start is not None:
            yield start, place
            start = None


def loss_without_unseen(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, unseen: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """transformers' causal-LM loss for logits float[n, V], each without the logit of `unseen` int64[n] (-100: none).

    Returns:
        A scalar.
    """
    if unseen is not None:
        wider = logits.new_zeros(len(logits), vocab_size + 1)
        wider.scatter_(1, unseen.where(unseen != IGNORED, vocab_size)[:, None], -torch.inf)
        logits = logits + wider[:, :vocab_size]
    loss: torch.Tensor = ForCausalLMLoss(logits, labels, vocab_size, **kwargs)
    return loss
