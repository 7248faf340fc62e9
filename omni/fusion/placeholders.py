"""A placeholder in a prompt is written as often as its item has tokens: "<image> what" -> "<image><image><image> what"."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import processing_utils

UNMARKED: str = getattr(processing_utils, "_UNMARKED", "")
"""In a pattern before a placeholder: one that no user wrote. transformers 5.23 marks those of users."""


def expand(
    texts: Sequence[str], counts: Mapping[str, Sequence[int]], tokens: Mapping[str, str]
) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Repeat each placeholder.

    Args:
        texts: the prompts.
        counts: for each modality the number of tokens of each item, in the order of the placeholders.
        tokens: the placeholder of each modality.

    Returns:
        The prompts with the placeholders repeated; and for each prompt where they are, in characters.

    Raises:
        ValueError: the prompts have more or fewer placeholders than there are items.
    """
    names = {token: name for name, token in tokens.items()}
    pattern = re.compile(UNMARKED + "(" + "|".join(map(re.escape, names)) + ")")
    for name, token in tokens.items():
        found, items = [sum(m[1] == token for m in pattern.finditer(text)) for text in texts], len(counts.get(name, ()))
        if sum(found) != items:
            raise ValueError(
                f"The number of {token} tokens in the prompts should be the same as the number of items of modality "
                f"{name!r}, found {sum(found)} (by row: {found}) and {items}."
            )
    waiting = {name: iter(numbers) for name, numbers in counts.items()}
    spans: list[list[dict[str, Any]]] = []

    def repeat(match: re.Match[str]) -> str:
        name, before = names[match[1]], spans[-1][-1] if spans[-1] else {"span": (0, 0), "new_span": (0, 0)}
        repeated = match[1] * next(waiting[name])
        start = before["new_span"][1] + match.start() - before["span"][1]
        new_span = start, start + len(repeated)
        spans[-1].append(
            {"type": name, "span": match.span(), "new_span": new_span, "text": match[1], "replacement": repeated}
        )
        return repeated

    expanded = []
    for text in texts:
        spans.append([])
        expanded.append(pattern.sub(repeat, text))
    return expanded, spans


def check_ids(texts: Sequence[str], input_ids: Any, tokens: Mapping[str, str], token_ids: Mapping[str, int]) -> None:
    """Check that the ids of each expanded prompt, int64[B, L], have all of its placeholders.

    Raises:
        ValueError: they have not. Truncation may cut text, but never an item.
    """
    rows = input_ids.tolist() if hasattr(input_ids, "tolist") else [list(row) for row in input_ids]
    for name, token in tokens.items():
        for row, (text, ids) in enumerate(zip(texts, rows, strict=True)):
            expected, found = len(re.findall(UNMARKED + re.escape(token), text)), ids.count(token_ids[name])
            if expected != found:
                raise ValueError(
                    f"Mismatch in `{name}` token count in row {row}: the text has {expected} placeholders {token}, the "
                    f"{len(ids)} input ids only {found}. Truncation cut inside an item; disable truncation or increase "
                    "`max_length`."
                )
