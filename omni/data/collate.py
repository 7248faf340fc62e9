"""Examples to batches: tokens, labels on the answers alone, and several conversations about one picture in one row.

A row that holds k conversations about the same items starts with what they share and goes on with k branches:

    <|user|> <image> x 50 | what shape is it <|assistant|> circle <|end|> | how many ... <|end|> | ...
    shared                  branch 1                                        branch 2

A branch sees what is shared and itself, and counts its positions from the end of the shared part, so the model computes
for it exactly what it would compute for that conversation alone, without reading the picture's tokens k times.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from omni.data.conversations import ControlTokenError, Example, ExampleError, LongExampleError, Message
from omni.fusion.processing_omni import join_inputs
from omni.registry import get_modality

IGNORED = -100

MAX_LENGTH = 2048
"""Tokens of a row."""


@dataclass(frozen=True)
class Row:
    """One packed row, before padding; lists of the length of the row."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branches: list[int]  # 0: shared, k: the k-th conversation


class ConversationCollator:
    """Examples -> `input_ids`, `labels`, `position_ids` int64[B, L], `attention_mask` bool[B, 1, L, L], and the items.

    Args:
        processor: the model's `OmniProcessor`.
        max_length: the longest row in tokens.
        max_positions: the longest conversation in tokens, as the Thinker was made for; None if that is not known.
        options: for each modality other settings than its preprocessor's own.

    Raises:
        ExampleError: an example without an answer to learn from, with control tokens in a text, or longer than `max_length`
            or `max_positions`; its source is named.
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
        """Make a batch of B examples, one row each."""
        batch: dict[str, torch.Tensor] = {}
        counts: dict[str, list[int]] = {}
        for modality in self.processor.bundles:
            items = [item for example in examples for item in example.items.get(modality.name, [])]
            if items:
                options = {"return_tensors": "pt", **self.options.get(modality.name, {})}
                prepared = self.processor._prepare(modality.name, items, options)
                counts[modality.name] = self.processor._counts(modality.name, prepared)
                join_inputs(batch, prepared)
        waiting = {name: iter(numbers) for name, numbers in counts.items()}
        rows = []
        for place, example in enumerate(examples):
            if strangers := sorted({name for name, items in example.items.items() if items} - set(counts)):
                raise ExampleError(
                    f"{_named(place, example)} has items of {strangers}; this processor takes "
                    f"{sorted(self.processor.preprocessors)}."
                )
            tokens = {name: [next(waiting[name]) for _ in example.items.get(name, [])] for name in counts}
            rows.append(self._pack(place, example, tokens))
        return batch | pad_rows(rows, self.processor.tokenizer.pad_token_id)

    def problem(self, example: Example, tokens: dict[str, list[int]]) -> ExampleError | None:
        """What making a row of an example would raise. `tokens`: how many tokens each of its items becomes, by modality."""
        try:
            self._pack(0, example, tokens)
        except ExampleError as error:
            return error
        return None

    def _pack(self, place: int, example: Example, tokens: dict[str, list[int]]) -> Row:
        """One row from the conversations of one example; `tokens`: how many tokens each of its items becomes."""
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
            raise ExampleError(f"{_named(place, example)} has no answer to learn from: {example.conversations}.")
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
        return Row(ids, labels, positions, branches)

    def _refuse_control_tokens(self, named: str, example: Example) -> None:
        """In a text they would end a turn or stand for a picture; `omni ask` takes them for text, so training may not."""
        for message in (message for conversation in example.conversations for message in conversation):
            blocks = message["content"]
            texts = [blocks] if isinstance(blocks, str) else [block.get("text", "") for block in blocks]
            if found := next(filter(None, map(self._control.search, texts)), None):
                raise ControlTokenError(
                    f"{named} has {found[0]!r} in the text of its {message['role']}, expected no control token of the "
                    "tokenizer there; take it out, and name pictures in blocks of their own."
                )

    def _expand(
        self, named: str, ids: list[int], mask: list[int], tokens: dict[str, list[int]]
    ) -> tuple[list[int], list[int]]:
        """Placeholders repeated by the token plan; labels where the assistant speaks."""
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
                    f"{named} has {expected} items of modality {name!r}, but a conversation with "
                    f"{found} placeholders {get_modality(name).token}."
                )
        return out_ids, labels


def _named(place: int, example: Example) -> str:
    return example.source or f"Example {place} of the batch"


_MARK = re.compile(r"\{%-?\s*generation\b")
"""How a chat template marks what the assistant says; most templates in the wild do not."""

Encoded = Iterator[tuple[list[int], list[int]]]
"""Of each conversation the token ids, and 1 for those that the assistant says, its end-of-text included."""


def _encode_marked(tokenizer: Any, conversations: list[list[Message]]) -> Encoded:
    """Where the template itself says what is an answer."""
    encoded = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, padding=False
    )
    return zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)


def _encode_compared(tokenizer: Any, conversations: list[list[Message]]) -> Encoded:
    """Where it does not: an answer is what rendering its turn adds to the prompt before it.

    Raises:
        ExampleError: a template that renders a turn differently once others follow, so that nothing can be compared.
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
                        f"The chat template renders {after!r} otherwise than its beginning {before!r} or than the whole "
                        "conversation does, so answers cannot be told apart; put {% generation %} around them in it."
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


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths to tensors, padded on the right; a padded position sees only itself."""
    length = max(len(row.input_ids) for row in rows)

    def padded(values: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in values])

    branches = padded([row.branches for row in rows], -1)  # (B, L)
    seen, seeing = branches[:, None, :], branches[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = causal & ((seen == 0) | (seen == seeing)) & (seen >= 0) & (seeing >= 0)
    mask |= torch.eye(length, dtype=torch.bool)
    return {
        "input_ids": padded([row.input_ids for row in rows], pad_token_id),
        "labels": padded([row.labels for row in rows], IGNORED),
        "position_ids": padded([row.position_ids for row in rows], 0),
        "attention_mask": mask[:, None],  # (B, 1, L, L)
    }
