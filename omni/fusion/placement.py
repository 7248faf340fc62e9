"""Every item has its tokens and its place in a prompt, and every placeholder belongs to an item."""

from collections.abc import Mapping

import torch
from transformers.utils import torch_compilable_check

from omni.registry import get_modality


def check_items(name: str, tokens: Mapping[str, torch.Tensor], count: int) -> None:
    """Check that each output of a modality's encoder, such as `cls` float[I, 1, D], has tokens for each of `count` items.

    Raises:
        ValueError: it has another first axis. Pixtral, for example, returns all pictures of a batch as one row.
    """
    if wrong := {part: len(each) for part, each in tokens.items() if len(each) != count}:
        raise ValueError(
            f"The encoder of modality {name!r} was given {count} items; its outputs have rows for {wrong}."
        )


def check_counts(name: str, mask: torch.Tensor, lengths: list[int]) -> None:
    """Check that each row has as many placeholders as its items have tokens.

    Args:
        name: the modality.
        mask: bool[B, L], where its placeholders are.
        lengths: how many tokens each item has, in the order of the rows.

    Raises:
        ValueError: a row has more or fewer placeholders; an item has no place.
    """
    if torch.compiler.is_compiling():  # compiled code knows no numbers, so the message has none
        torch_compilable_check(
            mask.sum() == sum(lengths), f"Placeholders and projected tokens of modality {name!r} do not match."
        )
        return
    token, item = get_modality(name).token, 0
    if len(lengths) == 1 and lengths[0] == mask.sum():
        return  # chunked prefill of `generate` passes the tokens of several rows as if they were one item
    for row, placeholders in enumerate(mask.sum(-1).tolist()):
        found = 0
        while found < placeholders and item < len(lengths):
            found += lengths[item]
            item += 1
        if found != placeholders:
            raise ValueError(
                f"Row {row} has {placeholders} placeholders {token} for modality {name!r}, but the encoder made "
                f"{found} tokens for it (items have {sorted(set(lengths)) or 'none'} each, {len(lengths)} items in the "
                "batch). Let the processor of this checkpoint make the inputs: it writes as many placeholders as the "
                "item has tokens; the usual causes are another processor, a prompt that was cut, or items left out."
            )
    if item != len(lengths):
        raise ValueError(
            f"The batch brings {len(lengths)} items of modality {name!r}, but its rows have placeholders {token} for "
            f"{item} only ({int(mask.sum())} placeholders). Every item needs its place in a prompt."
        )
