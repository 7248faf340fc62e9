"""What the Thinker is handed: positions, masks, attention that has maps to give, and no argument that it does not know."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from omni.registry import get_modality, registered

PASSED_ON = ("return_dict", "labels", "logits_to_keep", "shift_labels", "token_type_ids", "mm_token_type_ids",
             "cache_position", "attention_instances", "forward_batch", "debug_io", "cache", "block_table",
             "read_index", "write_index", "logits_indices", "logits_processor_args")  # fmt: skip
"""Arguments beside the Thinker's own that trainers and servers (continuous batching, vLLM, SGLang) hand through a model."""


def cached_tokens(cache: Cache | None) -> int | None:
    """Tokens that a cache holds; None in compiled code for a static one, which counts in a tensor."""
    seen = cache.get_seq_length() if cache is not None else 0
    if torch.is_tensor(seen):
        return None if torch.compiler.is_compiling() else int(seen)
    return seen  # an exported graph has a symbol here, which int() would make a constant


def positions_of(mask: torch.Tensor | None, cache: Cache | None, length: int) -> torch.Tensor | None:
    """Positions of the last `length` tokens, int64[B, length], counted from each row's first real token.

    Decoders count from the start of the row, so that with learned positions (GPT-2) padding on the left would matter.
    """
    past = cached_tokens(cache)
    if mask is None or past is None or mask.ndim != 2 or mask.shape[1] != past + length:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def attention_for_maps(config: Any, kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Eager attention while attention maps are asked for: of any other, transformers returns none without a word."""
    wanted = kwargs.get("output_attentions")
    return eager_attention(config) if (config.output_attentions if wanted is None else wanted) else nullcontext()


@contextmanager
def eager_attention(config: Any) -> Iterator[None]:
    """Inside, a model of this configuration writes its attention out, the only kind that has maps to give."""
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def readable_mask(mask: Any, config: Any, dtype: torch.dtype) -> Any:
    """Masks bool[B, 1, L, L] in the form that the attention reads: all but sdpa would add their 0 and 1 to the scores."""
    if isinstance(mask, Mapping):
        return {key: readable_mask(value, config, dtype) for key, value in mask.items()}
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def is_served(config: Any, attention_mask: Any) -> bool:
    """Whether this is a step of a server, such as vLLM or SGLang, which has an attention and a cache of its own.

    transformers makes no mask for such an attention, and none is given. The server embeds prompts and puts items into their
    places before. Here nothing is counted, since an error in a step ends the server for everybody.

    Args:
        config: of the Thinker.
        attention_mask: as `forward` gets it.
    """
    return attention_mask is None and config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS


def refuse_unknown(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `TypeError` for an argument of `forward` that neither a modality of the model nor its Thinker knows."""
    if arguments.keys() <= {"use_cache"}:  # each token's step
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
    """What is wrong with a model of these random parts."""
    return (
        f"These parts of the model are untrained, their weights are random: {list(parts)}. What it would say about an "
        "input means nothing."
    )
