"""Make batches of examples: tokens, labels on the answers alone, and all conversations about an item in one sequence.

A sequence of k conversations about the same items begins with the part that they share, and has k branches after it:

    <|user|> <image> x 50 | what shape is it <|assistant|> circle <|end|> | how many ... <|end|> | ...
    shared                  branch 1                                        branch 2

A branch attends to the shared part and to itself. It counts its positions from the end of the shared part. So the model
computes exactly the same for it as for that conversation alone, but reads the items' tokens once and not k times.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni.data.conversations import ControlTokenError, Example, ExampleError, LongExampleError, Message
from omni.fusion.processing_omni import join_inputs
from omni.items import Item, expect_known
from omni.modality import ItemError
from omni.registry import get_modality

IGNORED = -100

MAX_LENGTH = 2048
"""The largest number of tokens of a sequence."""


@dataclass(frozen=True)
class TokenSequence:
    """The tokens of one example, before padding. All lists have the same length."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branches: list[int]  # 0: shared, k: the k-th conversation


class ConversationCollator:
    """Examples -> `input_ids`, `labels`, `position_ids` int64[B, L], `attention_mask` bool[B, 1, L, L], and the items.

    Args:
        processor: the model's `OmniProcessor`.
        max_length: number of tokens of a sequence, at most.
        max_positions: number of tokens of a conversation, at most: the positions of the Thinker. None if unknown.
        options: for each modality, settings that replace those of its preprocessor.

    Raises:
        ExampleError: an example has no answer to learn, has items that the model does not take or a control token in a text,
            or is longer than `max_length` or `max_positions`. The message names its source.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int = MAX_LENGTH,
        max_positions: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.processor, self.max_length, self.max_positions = processor, max_length, max_positions
        self.options = options or {}
        special = sorted({str(token) for token in processor.tokenizer.added_tokens_decoder.values() if token.special})
        self._control = re.compile("|".join(map(re.escape, special)) or "(?!)")

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Make a batch of B examples, one sequence each."""
        batch: dict[str, torch.Tensor] = {}
        counts: dict[str, list[int]] = {}
        for modality in self.processor.bundles:
            if any(example.items.get(modality.name) for example in examples):
                prepared, counts[modality.name] = self._prepare(modality.name, examples)
                join_inputs(batch, prepared)
        waiting = {name: iter(numbers) for name, numbers in counts.items()}
        sequences = []
        for place, example in enumerate(examples):
            tokens = {
                name: [next(waiting[name]) if name in waiting else 0 for _ in items]
                for name, items in example.items.items()
            }
            sequences.append(self._tokenize(place, example, tokens))
        return batch | pad_sequences(sequences, self.processor.tokenizer.pad_token_id)

    def _prepare(self, name: str, examples: Sequence[Example]) -> tuple[dict[str, Any], list[int]]:
        """The inputs of a modality, and how many tokens each of its items becomes."""
        items = [item for example in examples for item in example.items.get(name, [])]
        try:
            prepared = self.processor.prepare(name, items, {"return_tensors": "pt", **self.options.get(name, {})})
            return prepared, self.processor.count_tokens(name, prepared)
        except ValueError as error:  # the sound may be longer than the encoder takes
            if len(examples) > 1:
                for example in (example for example in examples if example.items.get(name)):
                    self._prepare(name, [example])  # one by one, to name the one at fault
            raise ExampleError(f"{_named(0, examples[0])} has an item that cannot be prepared: {error}") from error

    def problem(self, example: Example, tokens: dict[str, list[int]]) -> ExampleError | None:
        """The error that an example would raise, if any. `tokens`: number of tokens of each of its items, by modality."""
        try:
            self._tokenize(0, example, tokens)
        except ExampleError as error:
            return error
        return None

    def _tokenize(self, place: int, example: Example, tokens: dict[str, list[int]]) -> TokenSequence:
        """One sequence of the conversations of an example. `tokens`: the number of tokens of each of its items."""
        expect_taken(_named(place, example), [name for name in tokens if tokens[name]], self.processor.preprocessors)
        self._refuse_control_tokens(_named(place, example), example)
        tokenizer = self.processor.tokenizer
        encode = _encode_marked if _MARK.search(tokenizer.chat_template or "") else _encode_compared
        chats = [
            self._expand(_named(place, example), ids, mask, tokens)
            for ids, mask in encode(tokenizer, example.conversations)
        ]
        shared = _common_prefix([list(zip(ids, labels, strict=True)) for ids, labels in chats]) if len(chats) > 1 else 0
        ids, labels = list(chats[0][0][:shared]), list(chats[0][1][:shared])
        positions, branches = list(range(shared)), [0] * shared
        for number, (chat_ids, chat_labels) in enumerate(chats, start=1):
            ids += chat_ids[shared:]
            labels += chat_labels[shared:]
            positions += range(shared, len(chat_ids))
            branches += [number] * (len(chat_ids) - shared)
        if all(label == IGNORED for label in labels):
            raise ExampleError(
                f"{_named(place, example)} has no answer to learn: {example.conversations}; add one, or leave it out."
            )
        if len(ids) > self.max_length:
            raise LongExampleError(
                f"{_named(place, example)} has {len(ids)} tokens, more than max_length={self.max_length}; raise it, "
                "or put fewer questions or items into one example. Nothing is cut."
            )
        if self.max_positions is not None and max(positions) >= self.max_positions:
            raise LongExampleError(
                f"{_named(place, example)} has a conversation of {max(positions) + 1} tokens, more than the "
                f"{self.max_positions} positions of the language model; shorten it, or show fewer items. Nothing is cut."
            )
        return TokenSequence(ids, labels, positions, branches)

    def _refuse_control_tokens(self, named: str, example: Example) -> None:
        """Refuse control tokens in texts: they would end a turn or stand for an item, but `omni ask` reads them as text."""
        for message in (message for conversation in example.conversations for message in conversation):
            blocks = message["content"]
            texts = [blocks] if isinstance(blocks, str) else [block.get("text", "") for block in blocks]
            if found := next(filter(None, map(self._control.search, texts)), None):
                raise ControlTokenError(
                    f"{named} has {found[0]!r} in the text of its {message['role']}, expected no control token of the "
                    "tokenizer there; take it out, and name items in blocks of their own."
                )

    def _expand(
        self, named: str, ids: list[int], mask: list[int], tokens: dict[str, list[int]]
    ) -> tuple[list[int], list[int]]:
        """Repeat placeholders by the token plan, and label the tokens of the assistant."""
        sections = self.processor.plan.modalities
        by_id = {sections[name]["token_id"]: name for name in sections}
        waiting = {name: iter(numbers) for name, numbers in tokens.items()}
        used = dict.fromkeys(tokens, 0)
        out_ids: list[int] = []
        labels: list[int] = []
        for token, spoken in zip(ids, mask, strict=True):
            repeat, name = 1, by_id.get(token)
            if name is not None:
                repeat = next(waiting.get(name, iter(())), 0)
                used[name] = used.get(name, 0) + 1
            out_ids += [token] * repeat
            labels += [token if spoken else IGNORED] * repeat
        for name, found in used.items():
            expected = len(tokens.get(name, ()))
            if found != expected:
                raise ExampleError(
                    f"{named} has {expected} items of modality {name!r}, but a conversation with {found} placeholders "
                    f"{get_modality(name).token}; write one for each item."
                )
        return out_ids, labels


def expect_taken(named: str, modalities: Iterable[str], model: Collection[str]) -> None:
    """Refuse an example with items of modalities that the model does not take.

    Raises:
        ExampleError: the model lacks one of them.
    """
    try:
        expect_known([Item(name, None) for name in modalities], model)
    except ItemError as error:
        raise ExampleError(f"{named} cannot be read by the model: {error}") from error


def _named(place: int, example: Example) -> str:
    return example.source or f"Example {place} of the batch"


_MARK = re.compile(r"\{%-?\s*generation\b")
"""The mark of a chat template around the assistant's words. Most templates have none."""

Encoded = Iterator[tuple[list[int], list[int]]]
"""For each conversation: token ids, and for each token 1 if the assistant says it, else 0. An end-of-text counts as said."""


def _encode_marked(tokenizer: Any, conversations: list[list[Message]]) -> Encoded:
    """Encode with a template that marks answers."""
    encoded = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    return zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)


def _encode_compared(tokenizer: Any, conversations: list[list[Message]]) -> Encoded:
    """Encode with a template that marks none: an answer is the text that its turn adds to the prompt before it.

    Raises:
        ExampleError: the template renders a turn differently once other turns follow, so the texts cannot be compared.
    """
    for messages in conversations:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
                after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False).rstrip()
                if not (whole.startswith(after) and after.startswith(before)):
                    raise ExampleError(
                        f"The chat template does not render {after!r} as a continuation of {before!r} and as a beginning of "
                        "the whole conversation, so answers cannot be told apart; put {% generation %} around them in it."
                    )
                spans.append((len(before), len(after)))
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        spoken = [
            int(any(start < right and left < end for left, right in spans)) for start, end in encoded["offset_mapping"]
        ]
        yield encoded["input_ids"], spoken


def _common_prefix(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the longest common prefix."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({sequence[i] for sequence in sequences}) > 1), shortest)


def pad_sequences(sequences: Sequence[TokenSequence], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Tensors of sequences, padded on the right to one length. A padded position attends only to itself."""
    length = max(len(each.input_ids) for each in sequences)

    def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([each + [fill] * (length - len(each)) for each in values])

    branches = padded([each.branches for each in sequences], -1)  # (B, L)
    seen, seeing = branches[:, None, :], branches[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((seen == 0) | (seen == seeing)) & (seen >= 0) & (seeing >= 0)
    mask |= torch.eye(length, dtype=torch.bool)
    return {
        "input_ids": padded([each.input_ids for each in sequences], pad_token_id),
        "labels": padded([each.labels for each in sequences], IGNORED),
        "position_ids": padded([each.position_ids for each in sequences], 0),
        "attention_mask": mask[:, None],  # (B, 1, L, L)
    }
