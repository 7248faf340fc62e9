"""A placeholder in a prompt is written as often as its item has tokens: "<image> what" -> "<image><image><image> what"."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import processing_utils

UNMARKED: str = getattr(processing_utils, "_UNMARKED", "")
"""The beginning of a pattern for placeholders that no user wrote. transformers 5.23 marks those in the texts of users."""


def expand(texts: Sequence[str], counts: Mapping[str, Sequence[int]], tokens: Mapping[str, str]) -> list[str]:
    """The prompts with each placeholder repeated.

    Args:
        texts: the prompts.
        counts: for each modality the number of tokens of each item, in the order of the placeholders.
        tokens: the placeholder of each modality.

    Raises:
        ValueError: the prompts have more or fewer placeholders than there are items.
    """
    names = {token: name for name, token in tokens.items()}
    pattern = pattern_of(tokens.values())
    for name, token in tokens.items():
        found, items = [sum(m[0] == token for m in pattern.finditer(text)) for text in texts], len(counts.get(name, ()))
        if sum(found) != items:
            raise ValueError(
                f"The number of {token} tokens in the prompts should be the same as the number of items of modality "
                f"{name!r}, found {sum(found)} (by row: {found}) and {items}."
            )
    waiting = {name: iter(numbers) for name, numbers in counts.items()}
    return [pattern.sub(lambda match: match[0] * next(waiting[names[match[0]]]), text) for text in texts]


def pattern_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches these placeholders, but not where a user wrote them."""
    return re.compile(UNMARKED + "(" + "|".join(map(re.escape, tokens)) + ")")


def check_ids(texts: Sequence[str], input_ids: Any, tokens: Mapping[str, str], token_ids: Mapping[str, int]) -> None:
    """Check that the ids of each expanded prompt, int64[B, L], have all of its placeholders.

    Raises:
        ValueError: some are missing. Truncation may cut text, but never an item.
    """
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else [list(row) for row in input_ids]
    for name, token in tokens.items():
        for row, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            expected, found = len(pattern_of([token]).findall(text)), ids.count(token_ids[name])
            if expected != found:
                raise ValueError(
                    f"Mismatch in `{name}` token count in row {row}: the text has {expected} placeholders {token}, the "
                    f"{len(ids)} input ids only {found}. Truncation cut inside an item; disable truncation or increase "
                    "`max_length`."
                )
