"""Items become tokens of the Thinker: a tower encodes them, a projector projects them, and they take their places.

Shapes: I items of one modality over all rows, item i with N_i places in its grid and n_i tokens; D width of the encoder;
B rows of L tokens, T width of the Thinker.

    pixel_values (I, 3, H, W) ─▶ run_tower ─▶ cls (1, D), grid (N_i, D) ─▶ project ─▶ (n_i, T) ─▶ place ─▶ (B, L, T)
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from omni.registry import get_modality

from .encoded_item import EncodedItem
from .placement import check_counts, check_items
from .thinker import attention_for_maps


def run_tower(
    name: str, section: Mapping[str, Any], tower: nn.Module, inputs: Mapping[str, Any]
) -> tuple[Any, list[EncodedItem]]:
    """What a tower returns, and the same item by item: the outputs that its projector reads.

    Args:
        name: the modality.
        section: the modality's section of the configuration: its `encoder`, and the `output` to keep.
        tower: the encoder.
        inputs: the modality's inputs, such as `pixel_values` float[I, 3, H, W]; anything else goes to the encoder.

    Raises:
        ValueError: an input is missing, or the encoder does not have this output.
    """
    modality, wanted = get_modality(name), section["output"].split("+")
    if absent := [key for key in modality.inputs if inputs.get(key) is None]:
        raise ValueError(f"The encoder of modality {name!r} reads {list(modality.inputs)}; missing: {absent}.")
    arguments = {modality.arguments.get(key, key): value for key, value in inputs.items()} | {"return_dict": True}
    if wanted == ["cls"] and "cls_only" in inspect.signature(tower.forward).parameters:
        arguments["cls_only"] = True
    with attention_for_maps(tower.config, inputs):
        encoded = tower(**arguments)
    shapes = [tuple(shape) for shape in modality.grid_shapes(section["encoder"], inputs)]
    by_shape: dict[tuple[int, ...], dict[str, Sequence[torch.Tensor]]] = {}
    for shape in dict.fromkeys(shapes):
        tokens = modality.read(encoded, math.prod(shape))
        check_items(name, tokens, len(shapes))
        if lacking := [part for part in wanted if part not in tokens]:
            raise ValueError(
                f"The encoder of modality {name!r} has no {lacking} for output {section['output']!r}; it has "
                f"{list(tokens)}."
            )
        # a batch of items of several lengths is padded to the longest: the item's own tokens come first
        own = {"cls": slice(None), "grid": slice(math.prod(shape))}
        by_shape[shape] = {part: tokens[part][:, own[part]].unbind() for part in wanted}
    tokens_of = [{part: each[i] for part, each in by_shape[shape].items()} for i, shape in enumerate(shapes)]
    return encoded, [EncodedItem(tokens, shape) for tokens, shape in zip(tokens_of, shapes, strict=True)]


def project(section: Mapping[str, Any], projector: nn.Module, items: Sequence[EncodedItem]) -> list[torch.Tensor]:
    """Tokens of the Thinker, float[n_i, T] for each item; items of one grid pass the projector together."""
    # where weights are offloaded (on "meta"), accelerate brings tokens and weights together
    device = next((each.device for each in projector.parameters() if each.device.type != "meta"), None)
    # None if all weights are quantized to integers: the projector then takes tokens of any type
    dtype = next((each.dtype for each in projector.parameters() if each.is_floating_point()), None)
    features: list[torch.Tensor] = [torch.empty(0)] * len(items)
    for shape in dict.fromkeys(item.grid_shape for item in items):
        members = [i for i, item in enumerate(items) if item.grid_shape == shape]
        tokens = {
            part: torch.stack([torch.as_tensor(items[i].tokens[part], device=device) for i in members]).to(dtype=dtype)
            for part in section["output"].split("+")
        }
        for i, projected in zip(members, projector(tokens, shape), strict=True):
            features[i] = projected
    return features


def place(
    name: str, placeholders: torch.Tensor, features: Sequence[torch.Tensor], inputs_embeds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Write the projected tokens of a modality, I x float[n_i, T], over its placeholders, bool[B, L], in order.

    Returns `inputs_embeds` float[B, L, T] with them in place, and all of them as float[sum of n_i, T].

    Raises:
        ValueError: placeholders and tokens do not match in some row.
    """
    check_counts(name, placeholders, [len(item) for item in features])
    if not features:
        return inputs_embeds, None
    tokens = torch.cat(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), tokens), tokens
