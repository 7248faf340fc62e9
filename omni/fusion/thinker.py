"""Runs the Thinker: its positions, its mask, attention that returns maps, and a check of its arguments."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import TransformersKwargs

from omni.registry import get_modality, registered

from .acceleration import Acceleration, current
from .signature import CACHE

PASSED_ON = ("return_dict", "labels", "logits_to_keep", "shift_labels", "token_type_ids", "mm_token_type_ids",
             "cache_position", "attention_instances", "forward_batch", "debug_io", "cache", "block_table",
             "read_index", "write_index", "logits_indices", "logits_processor_args")  # fmt: skip
"""Arguments that trainers and servers (continuous batching, vLLM, SGLang) pass through a model, beside the Thinker's own."""


def think(
    language_model: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    options: Mapping[str, Any],
) -> Any:
    """The Thinker's output for embedded tokens. The acceleration in use may compute it.

    Args:
        language_model: the Thinker.
        inputs_embeds: float[B, L, T], items in their places.
        attention_mask: as `OmniModel.forward` takes it.
        position_ids: int64[B, L]; by default those of `positions_of`.
        cache: the Thinker's cache; it grows by L tokens.
        options: the Thinker's other arguments.

    Returns:
        An output of transformers, with `last_hidden_state` float[B, L, T].
    """
    if position_ids is None:
        position_ids = positions_of(attention_mask, cache, inputs_embeds.shape[1])
    use = Acceleration() if torch.compiler.is_compiling() else current()
    with use.reading() if inputs_embeds.shape[1] > 1 else nullcontext():
        done = use.step(language_model, inputs_embeds, attention_mask, position_ids, cache, options)
        if done is not None:
            return BaseModelOutputWithPast(last_hidden_state=done, **{CACHE: cache})
        with attention_for_maps(language_model.config, options):
            return language_model(
                attention_mask=readable_mask(attention_mask, language_model.config, inputs_embeds.dtype),
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **{CACHE: cache, **options},
            )


def per_layer_inputs(model: Any, input_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What some Thinkers (Gemma 3n and 4) read beside embeddings: each of their layers embeds each id once more.

    Items have no ids. In their places is the embedding of padding, as in transformers' own models.

    Args:
        model: the fused model without its head.
        input_ids: int64[B, L].

    Returns:
        `per_layer_inputs` float[B, L, layers, width] by name; nothing for other Thinkers.

    Raises:
        ValueError: the Thinker needs ids, and there are none.
    """
    thinker = model.language_model
    width = getattr(thinker.config, "hidden_size_per_layer_input", None)
    if not width:
        return {}
    if input_ids is None or not input_ids.numel():
        raise ValueError(
            f"Expected `input_ids`, found `inputs_embeds` alone: each layer of {type(thinker).__name__} embeds the ids."
        )
    placeholders = input_ids.new_tensor([section["token_id"] for section in model.config.modalities.values()])
    ids = input_ids.masked_fill(torch.isin(input_ids, placeholders), thinker.config.pad_token_id or 0)
    return {"per_layer_inputs": thinker.embed_tokens_per_layer(ids).unflatten(-1, (-1, width))}


def cached_tokens(cache: Cache | None) -> int | None:
    """How many tokens a cache holds; None in compiled code for a static cache, whose count is a tensor."""
    seen = cache.get_seq_length() if cache is not None else 0
    if torch.is_tensor(seen):
        return None if torch.compiler.is_compiling() else int(seen)
    return seen  # an exported graph has a symbol here, which int() would make a constant


def positions_of(mask: torch.Tensor | None, cache: Cache | None, length: int) -> torch.Tensor | None:
    """Positions of the last `length` tokens, int64[B, length], counted from each row's first real token.

    Language models count from the start of the row. With learned positions (GPT-2), padding on the left would then change
    the result.
    """
    past = cached_tokens(cache)
    if mask is None or past is None or mask.ndim != 2 or mask.shape[1] != past + length:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def attention_for_maps(config: Any, kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Eager attention while attention maps are asked for. With any other, transformers returns none and says nothing."""
    wanted = kwargs.get("output_attentions")
    return eager_attention(config) if (config.output_attentions if wanted is None else wanted) else nullcontext()


@contextmanager
def eager_attention(config: Any) -> Iterator[None]:
    """Inside, a model of this configuration computes attention step by step, the only kind that returns maps."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def readable_mask(mask: Any, config: Any, dtype: torch.dtype) -> Any:
    """A mask bool[B, 1, L, L] in the form that the attention reads: all but sdpa would add its 0 and 1 to the scores."""
    if isinstance(mask, Mapping):
        return {key: readable_mask(value, config, dtype) for key, value in mask.items()}
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def starts_rows(model: Any, attention_mask: Any, cache: Cache | None) -> bool:
    """Whether this step reads rows from their start, so that each placeholder in them needs its item.

    A server such as vLLM or SGLang has its own attention and cache. It embeds prompts and places items before it calls the
    model. Nothing is counted then, since an error in a step ends the server for everybody.

    Args:
        model: the fused model without its head.
        attention_mask: as `forward` gets it. transformers makes no mask for a server's attention, and none is given.
        cache: the Thinker's cache.

    Raises:
        ValueError: a server runs a model with parts that were never trained.
    """
    attention = model.language_model.config._attn_implementation
    if attention_mask is not None or attention in ALL_MASK_ATTENTION_FUNCTIONS:
        return cached_tokens(cache) == 0
    if model.config.untrained and not model.training:
        raise ValueError(
            f"{untrained_message(model.config.untrained)} Train them before they are served, or empty `untrained` in "
            "config.json."
        )
    return False


def refuse_unknown(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `TypeError` for an argument of `forward` that neither a modality of the model nor its Thinker knows."""
    if arguments.keys() <= {"use_cache"}:  # the usual case in `generate`, which must be quick
        return
    known = {
        *TransformersKwargs.__annotations__,
        *inspect.signature(model.language_model.forward).parameters,
        *PASSED_ON,
    }
    if unknown := sorted(set(arguments) - known):
        others = {key: other.name for other in registered() for key in other.inputs}
        lacking = [
            f"; {key!r} belongs to modality {others[key]!r}, which this model lacks" for key in unknown if key in others
        ]
        reads = [key for name in model.config.modalities for key in get_modality(name).inputs]
        raise TypeError(
            f"{type(model).__name__} knows no argument {', '.join(map(repr, unknown))}{''.join(lacking)}. Its modalities "
            f"read {reads}."
        )


def untrained_message(parts: Sequence[str]) -> str:
    """The first half of a message about a model whose `parts` are random."""
    return (
        f"These parts of the model are untrained, their weights are random: {list(parts)}. What it would say about an "
        "input means nothing."
    )
