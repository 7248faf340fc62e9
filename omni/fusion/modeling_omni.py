"""The fused model: encoders of any modality, their projectors, and a causal language model, the Thinker.

Shapes: B rows, L tokens in a row, T width of the Thinker, V vocabulary; per modality I items over all rows, and n_i
tokens that item i becomes (the token plan, `OmniConfig.num_tokens`).

    input_ids (B, L) ─▶ embed ─▶ (B, L, T) ─────────────▶ place at the placeholders ─▶ Thinker ─▶ logits (B, L, V)
    pixel_values (I, 3, H, W) ─▶ image_tower ─▶ image_projector ─▶ I x (n_i, T) ──┘

Parts have the names that transformers, its exporters and vLLM look for: `<name>_tower`, `<name>_projector`,
`language_model`, `lm_head`, and a method `get_<name>_features` for each modality.
"""

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, TransformersKwargs, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from omni.checkpoints.strict import StrictLoadingMixin
from omni.projectors import PROJECTORS, compute_dtype
from omni.registry import Modality, get_modality, on_change, registered

from . import acceleration
from .configuration_omni import OmniConfig
from .encoded_item import EncodedItem
from .quantization import spare_small_parts

Encoded = Mapping[str, ModelOutput | Sequence[EncodedItem]]

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls the cache: "past_key_values" until 5.23."""


def _cache_by_either_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that takes `cache` for `past_key_values`."""

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return forward(self, *args, **kwargs)

    return wrapper


@dataclass
class OmniModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `OmniModel`: the Thinker's, and what was placed.

    Attributes:
        last_hidden_state: float[B, L, T].
        encoder_hidden_states: for each modality present, its projected tokens, float[sum of n_i, T].
    """

    encoder_hidden_states: dict[str, torch.Tensor] | None = None


@dataclass
class OmniCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `OmniForConditionalGeneration`.

    Attributes:
        loss: float, mean over the labelled tokens; None without labels.
        logits: float[B, L, V], or of the positions asked for by `logits_to_keep`.
        encoder_hidden_states: for each modality present, its projected tokens, float[sum of n_i, T].
    """

    encoder_hidden_states: dict[str, torch.Tensor] | None = None


class OmniPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """What transformers has to know of the fused model; its parts bring their own."""

    config: OmniConfig
    config_class = OmniConfig
    base_model_prefix = "model"
    found_as = {
        "AutoConfig": "OmniConfig",
        "AutoModel": "OmniModel",
        "AutoModelForImageTextToText": "OmniForConditionalGeneration",
        "AutoModelForMultimodalLM": "OmniForConditionalGeneration",
        "AutoProcessor": "OmniProcessor",
    }
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.input_modalities = (*config.modalities, "text")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `StrictLoadingMixin.from_pretrained`; a `quantization_config` is for the Thinker, see `spare_small_parts`."""
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = spare_small_parts(quantization)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def train(self, mode: bool = True) -> "OmniPreTrainedModel":
        """Training mode for the parts that learn; a part that is frozen as a whole stays in eval mode, without dropout."""
        super().train(mode)
        for part in self.children() if mode else ():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self


class OmniModel(OmniPreTrainedModel):
    """Encoders, projectors and the Thinker without its head."""

    left_to_others = re.compile(r"lm_head\.")  # a checkpoint with a head serves the base model too

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        for name, section in config.modalities.items():
            encoder = section["encoder"]
            projector = PROJECTORS[section["projector"]]
            modality = get_modality(name)
            ours = type(encoder) is modality.config_class  # of others, transformers knows the model
            setattr(self, f"{name}_tower", modality.model_class(encoder) if ours else AutoModel.from_config(encoder))
            setattr(
                self,
                f"{name}_projector",
                projector(
                    hidden_size=encoder.hidden_size,
                    text_hidden_size=config.text_config.hidden_size,
                    factor=section["factor"],
                    grid_dims=modality.grid_dims,
                    output=section["output"],
                ),
            )
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    @_cache_by_either_name
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: Encoded | None = None,
        **kwargs: Any,
    ) -> OmniModelOutputWithPast:
        """Embed; for each modality present encode, project and place; then the Thinker.

        Args:
            input_ids: int64[B, L] with one placeholder id per projected token, as the processor writes them.
            attention_mask: int64[B, L], 1 for real tokens; or any mask that the Thinker takes.
            inputs_embeds: float[B, L, T] instead of `input_ids`; placeholders are where the placeholder's embedding is.
            mm_encoder_outputs: already encoded items, by modality: a list of `EncodedItem`s, as `encode_items` and caches
                have them, or projected as `get_<name>_features` returns them.
            kwargs: the inputs of the modalities (`pixel_values` float[I, 3, H, W], ...), and what the Thinker takes.

        Raises:
            ValueError: placeholders and projected tokens that do not match in some row; an item given twice, raw and
                encoded; both or neither of `input_ids` and `inputs_embeds`.
            TypeError: an argument that nothing here knows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        encoded = self.encode(kwargs, mm_encoder_outputs)
        self._refuse_unknown(kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        served = self._served(attention_mask)
        if served and self.config.untrained and not self.training:
            raise ValueError(
                f"{_untrained(self.config.untrained)} Train them before they are served, or empty `untrained` in config.json."
            )
        first = _cached_tokens(past_key_values) == 0 and not served
        placed = {}
        for name in self.config.modalities:
            if name in encoded or first:
                features = encoded[name].pooler_output if name in encoded else []
                inputs_embeds, placed[name] = self.place(name, features, input_ids, inputs_embeds)
        if position_ids is None:
            position_ids = _positions(attention_mask, past_key_values, inputs_embeds.shape[1])
        if not torch.compiler.is_compiling():
            done = acceleration.current().step(
                self.language_model, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
            )
            if done is not None:
                return OmniModelOutputWithPast(last_hidden_state=done, **{CACHE: past_key_values})
        with _attention_for_maps(self.language_model.config, kwargs):
            outputs = self.language_model(
                attention_mask=_readable(attention_mask, self.language_model.config, inputs_embeds.dtype),
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **{CACHE: past_key_values, **kwargs},
            )
        return OmniModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            encoder_hidden_states={name: tokens for name, tokens in placed.items() if tokens is not None} or None,
            **{CACHE: outputs.get(CACHE)},
        )

    def encode(self, inputs: dict[str, Any], encoded: Encoded | None = None) -> dict[str, ModelOutput]:
        """Encode and project the items of every modality in `inputs`, which loses them; keep what is encoded already."""
        result: dict[str, ModelOutput] = {}
        for name, output in (encoded or {}).items():
            if isinstance(output, ModelOutput):
                result[name] = output
            elif output is not None:
                result[name] = BaseModelOutputWithPooling(pooler_output=self.project(name, output))
        if unknown := sorted(set(result) - set(self.config.modalities)):
            raise ValueError(f"Encoded items of {unknown}, but this model has {sorted(self.config.modalities)}.")
        for name in self.config.modalities:
            present = {key: inputs.pop(key) for key in get_modality(name).inputs if key in inputs}
            present = {key: value for key, value in present.items() if value is not None}
            if present and name in result:
                raise ValueError(f"The items of modality {name!r} came twice: raw ({sorted(present)}) and encoded.")
            if present:
                result[name] = self.get_features(name, **present)
        return result

    def get_features(self, name: str, **inputs: Any) -> BaseModelOutputWithPooling:
        """Encode and project the items of one modality.

        Args:
            name: the modality.
            inputs: its inputs, such as `pixel_values` float[I, 3, H, W]; anything else goes to the encoder.

        Returns:
            The encoder's output, with `pooler_output` the list of each item's projected tokens, float[n_i, T].
        """
        modality, section = get_modality(name), self.config.modalities[name]
        if absent := [key for key in modality.inputs if inputs.get(key) is None]:
            raise ValueError(f"The encoder of modality {name!r} reads {list(modality.inputs)}; missing: {absent}.")
        tower, projector = getattr(self, f"{name}_tower"), getattr(self, f"{name}_projector")
        inputs.pop("return_dict", None)
        if section["output"] == "cls" and "cls_only" in inspect.signature(tower.forward).parameters:
            inputs["cls_only"] = True
        with _attention_for_maps(tower.config, inputs):
            encoded = tower(**_arguments(modality, inputs), return_dict=True)
        shapes = modality.grid_shapes(section["encoder"], inputs)
        features: list[torch.Tensor] = [torch.empty(0)] * len(shapes)
        for shape, members in _by_shape(shapes).items():
            tokens = self._selected(name, encoded, shape)
            if len(members) < len(shapes):
                tokens = {key: value[members] for key, value in tokens.items()}
            for i, projected in zip(members, projector(tokens, shape), strict=True):
                features[i] = projected
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.get("last_hidden_state"),
            pooler_output=features,
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
        )

    def encode_items(self, name: str, **inputs: Any) -> list[EncodedItem]:
        """The items of one modality as its encoder leaves them, to be projected as often as is needed.

        Args:
            name: the modality.
            inputs: its inputs, such as `pixel_values` float[I, 3, H, W].
        """
        modality, encoder = get_modality(name), self.config.modalities[name]["encoder"]
        encoded = getattr(self, f"{name}_tower")(**_arguments(modality, inputs), return_dict=True)
        shapes = [tuple(shape) for shape in modality.grid_shapes(encoder, inputs)]
        items = []
        for i, shape in enumerate(shapes):
            tokens = self._selected(name, encoded, shape)
            items.append(EncodedItem({part: value[i] for part, value in tokens.items()}, shape))
        return items

    def project(self, name: str, items: Sequence[EncodedItem]) -> list[torch.Tensor]:
        """The tokens of encoded items in the Thinker's space, float[n_i, T] each."""
        if name not in self.config.modalities:
            raise ValueError(f"Encoded items of {[name]}, but this model has {sorted(self.config.modalities)}.")
        projector, output = getattr(self, f"{name}_projector"), self.config.modalities[name]["output"]
        device, dtype = next(projector.parameters()).device, compute_dtype(projector)
        features: list[torch.Tensor] = [torch.empty(0)] * len(items)
        for shape, members in _by_shape([item.grid_shape for item in items]).items():
            tokens = {
                part: torch.stack([torch.as_tensor(items[i].tokens[part]) for i in members]).to(device, dtype)
                for part in output.split("+")
            }
            for i, projected in zip(members, projector(tokens, shape), strict=True):
                features[i] = projected
        return features

    def _selected(self, name: str, encoded: Any, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The named outputs of the encoder that the section hands to the projector."""
        output, patches = self.config.modalities[name]["output"], math.prod(shape)
        tokens = get_modality(name).read(encoded, patches)
        wanted = output.split("+")
        if lacking := [part for part in wanted if part not in tokens]:
            raise ValueError(
                f"The encoder of modality {name!r} has no {lacking} for output {output!r}; it has {list(tokens)}."
            )
        dtype = compute_dtype(getattr(self, f"{name}_projector"))
        # a batch of items of several lengths is padded to the longest: the item's own tokens come first
        return {
            part: (tokens[part][:, :patches] if part == "grid" else tokens[part]).to(dtype=dtype) for part in wanted
        }

    def place(
        self, name: str, features: Sequence[torch.Tensor], input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Write the projected tokens of a modality, I x float[n_i, T], over its placeholders, in order.

        Returns `inputs_embeds` float[B, L, T] with them in place, and all of them as float[sum of n_i, T].
        """
        mask = self.placeholders(name, input_ids, inputs_embeds)
        lengths = [len(item) for item in features]
        if torch.compiler.is_compiling():  # no numbers there: the message has to do
            torch_compilable_check(
                mask.sum() == sum(lengths), f"Placeholders and projected tokens of modality {name!r} do not match."
            )
        else:
            self._check_counts(name, mask, lengths)
        if not features:
            return inputs_embeds, None
        tokens = torch.cat(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), tokens), tokens

    def placeholders(
        self, name: str, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Where a modality's tokens go, bool[B, L]; without ids, where the placeholder's embedding stands."""
        token_id = self.config.modalities[name]["token_id"]
        if input_ids is not None and input_ids.numel():  # generate has empty ids beside embeddings
            return input_ids == token_id
        assert inputs_embeds is not None
        embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
        return (inputs_embeds == embedding).all(-1)

    def _check_counts(self, name: str, mask: torch.Tensor, lengths: list[int]) -> None:
        """Each row must have as many placeholders as the items that stand in it have tokens."""
        token, item = get_modality(name).token, 0
        if len(lengths) == 1 and lengths[0] == mask.sum():
            return  # also how generate's chunked prefill hands over the tokens of several rows: as if of one item
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

    def _served(self, attention_mask: Any) -> bool:
        """Whether this is a step of a server, such as vLLM or SGLang, which has an attention and a cache of its own.

        transformers makes no mask for such an attention, and none is given. The server embeds prompts and puts items into
        their places before: here nothing is counted, since whatever is raised in a step ends the server for everybody.
        """
        attention = self.language_model.config._attn_implementation
        return attention_mask is None and attention not in ALL_MASK_ATTENTION_FUNCTIONS

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        if kwargs.keys() <= {"use_cache"}:  # each token's step
            return
        known = {
            *TransformersKwargs.__annotations__,
            *inspect.signature(self.language_model.forward).parameters,
            *PASSED_ON,
        }
        if unknown := sorted(set(kwargs) - known):
            others = {key: other.name for other in registered() for key in other.inputs}
            raise TypeError(
                f"{type(self).__name__} knows no argument {', '.join(map(repr, unknown))}"
                + "".join(
                    f"; {key!r} belongs to modality {others[key]!r}, which this model lacks"
                    for key in unknown
                    if key in others
                )
                + f". Its modalities read {[key for name in self.config.modalities for key in get_modality(name).inputs]}."
            )


def _arguments(modality: Modality, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What an encoder's forward gets, by the names of its arguments."""
    names = modality.arguments
    return {names.get(key, key): value for key, value in inputs.items()}


def _untrained(parts: Sequence[str]) -> str:
    return (
        f"These parts of the model are untrained, their weights are random: {list(parts)}. What it would say about an "
        "input means nothing."
    )


def _by_shape(shapes: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Items of one shape go through the projector together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(tuple(shape), []).append(i)
    return groups


def _cached_tokens(cache: Cache | None) -> int | None:
    """Tokens that a cache holds; None in compiled code for a static one, which counts in a tensor."""
    seen = cache.get_seq_length() if cache is not None else 0
    if torch.is_tensor(seen):
        return None if torch.compiler.is_compiling() else int(seen)
    return seen  # an exported graph has a symbol here, which int() would make a constant


def _positions(mask: torch.Tensor | None, cache: Cache | None, length: int) -> torch.Tensor | None:
    """Positions of the last `length` tokens, int64[B, length], counted from each row's first real token.

    Decoders count from the start of the row, so that with learned positions (GPT-2) padding on the left would matter.
    """
    past = _cached_tokens(cache)
    if mask is None or past is None or mask.ndim != 2 or mask.shape[1] != past + length:
        return None
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _attention_for_maps(config: Any, kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
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


def _readable(mask: Any, config: Any, dtype: torch.dtype) -> Any:
    """Masks bool[B, 1, L, L] in the form that the attention reads: all but sdpa would add their 0 and 1 to the scores."""
    if isinstance(mask, Mapping):
        return {key: _readable(value, config, dtype) for key, value in mask.items()}
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or config._attn_implementation == "sdpa":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


PASSED_ON = ("return_dict", "labels", "logits_to_keep", "shift_labels", "token_type_ids", "mm_token_type_ids",
             "cache_position", "attention_instances", "forward_batch", "debug_io", "cache", "block_table",
             "read_index", "write_index", "logits_indices", "logits_processor_args")  # fmt: skip
"""Arguments beside the Thinker's own that trainers and servers (continuous batching, vLLM, SGLang) hand through a model."""


class OmniForConditionalGeneration(OmniPreTrainedModel, GenerationMixin):
    """The fused model with its output head: reads pictures (and whatever else is registered) and text, writes text."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.model = OmniModel(config)
        self.lm_head = _stock_head(config.text_config)
        self._tied_weights_keys = {"lm_head.weight": f"model.{_embedding_name(self.model)}"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head, float[..., T] -> float[..., V]."""
        return self.lm_head

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save, with `tie_word_embeddings` as it is: to replace head or embedding alone, as merged adapters do, unties."""
        head, embedding = (getattr(part, "weight", None) for part in (self.lm_head, self.get_input_embeddings()))
        if isinstance(head, torch.Tensor) and isinstance(embedding, torch.Tensor) and head.device.type != "meta":
            tied = head is embedding
            if tied != self.config.tie_word_embeddings:
                self.config.tie_word_embeddings = tied
                self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        return super().save_pretrained(*args, **kwargs)

    def get_features(self, name: str, **inputs: Any) -> BaseModelOutputWithPooling:
        """As `OmniModel.get_features`."""
        return self.model.get_features(name, **inputs)

    @can_return_tuple
    @_cache_by_either_name
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: Encoded | None = None,
        **kwargs: Any,
    ) -> OmniCausalLMOutputWithPast:
        """As `OmniModel.forward`, then logits, and the loss where there are labels.

        Args:
            labels: int64[B, L], -100 where nothing is to be learnt.
            logits_to_keep: only the last so many positions; 0 for all. Or positions, int64[n] or int64[B, n]; logits are then
                float[B, n, V]. Or bool[B, L]: the n positions where it is true, logits are then float[n, V]. Training needs
                no more than those before a label, a few of a row.
            kwargs: `unseen` int64[B, L] and `num_items_in_batch` are for a `loss_function` of the caller's; the rest as in
                `OmniModel.forward`.

        Raises:
            ValueError: see `OmniModel.forward`, and a label of a position that `logits_to_keep` leaves out.
        """
        loss_kwargs = {key: kwargs.pop(key) for key in LOSS_KWARGS if key in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
            if labels is not None:
                loss_kwargs["shift_labels"] = _labels_of(logits_to_keep, labels)
                if "unseen" in loss_kwargs:
                    loss_kwargs["unseen"] = nn.functional.pad(loss_kwargs["unseen"][:, 1:], (0, 1), value=-100)[
                        logits_to_keep
                    ]
            hidden_states = hidden_states[logits_to_keep]
        elif isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
            hidden_states = _take(hidden_states, logits_to_keep)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        logits = _shape_logits(self.lm_head(hidden_states), self.config.text_config)
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **loss_kwargs)
        return OmniCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            encoder_hidden_states=outputs.encoder_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def generate(self, *args: Any, allow_untrained: bool = False, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, for padding on either side; the prompts it returns are padded on the left.

        Args:
            allow_untrained: generate although parts of the model have random weights.

        Raises:
            ValueError: untrained parts that are needed; tower and projector of a modality are, where it has an item.
        """
        encoded = kwargs.get("mm_encoder_outputs") or {}
        needless = {
            f"{name}_{part}"
            for name in self.config.modalities
            if encoded.get(name) is None and all(kwargs.get(key) is None for key in get_modality(name).inputs)
            for part in ("tower", "projector")
        }
        if not allow_untrained and (random := [part for part in self.config.untrained or [] if part not in needless]):
            raise ValueError(f"{_untrained(random)} Train them, or pass allow_untrained=True to generate anyway.")
        with acceleration.current().writing(self.model.language_model):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Where transformers would take its own growing cache, take that of `acceleration`."""
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache: Any = model_kwargs.get(CACHE)
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs[CACHE] = acceleration.current().cache(self.config.get_text_config(decoder=True))

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        """Move padding to the left, where generation needs it, so that no row sees a gap before its answer."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if (
            mask is None
            and name == "input_ids"
            and pad is not None
            and pad not in (eos if isinstance(eos, list) else [eos])
        ):
            mask = inputs != pad  # what transformers will assume
        if mask is None or mask.shape != inputs.shape[:2] or _cached_tokens(cache) != 0:
            return inputs, name, model_kwargs
        ids, embeds = (inputs, None) if name == "input_ids" else (model_kwargs.get("input_ids"), inputs)
        if any((self.model.placeholders(m, ids, embeds) & (mask == 0)).any() for m in self.config.modalities):
            return inputs, name, model_kwargs  # masked items are not padding; their order must stay
        order = (mask != 0).int().argsort(dim=1, stable=True)  # padding first, the rest in its order
        for key in PER_TOKEN:
            if (value := model_kwargs.get(key)) is not None and value.shape[:2] == mask.shape:
                model_kwargs[key] = _take(value, order)
        return _take(inputs, order), name, model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """What is generated is text: a placeholder would be an item that nobody gave."""
        processors = super()._get_logits_processor(*args, **kwargs)
        token_ids = [section["token_id"] for section in self.config.modalities.values()]
        if token_ids:  # first, so that top-k and the like choose among what is left
            processors.insert(0, SuppressTokensLogitsProcessor(token_ids, device=kwargs.get("device") or "cpu"))
        return processors

    # transformers prepares and expands encoded items for pictures and videos alone; here it is every modality

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Encode, and check the counts here: beams repeat rows and chunks cut them before forward sees them."""
        model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        ids, embeds = (inputs_tensor, None) if inputs_tensor.ndim == 2 else (None, inputs_tensor)
        for name in self.config.modalities if _cached_tokens(model_kwargs.get(CACHE)) == 0 else ():
            encoded = model_kwargs.get("mm_encoder_outputs", {}).get(name)
            lengths = [len(item) for item in encoded.pooler_output] if encoded is not None else []
            self.model._check_counts(name, self.model.placeholders(name, ids, embeds), lengths)
        return model_kwargs

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Encode every item once, before the first step."""
        with acceleration.current().encoding():
            encoded = self.model.encode(model_kwargs, model_kwargs.pop("mm_encoder_outputs", None))
        if encoded:
            model_kwargs["mm_encoder_outputs"] = encoded
        return model_kwargs

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Read the prompt."""
        with acceleration.current().reading():
            return super()._prefill(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """A step on an empty cache is the first one; a drafting assistant's is not marked so and would lose its items."""
        kwargs.pop("tokenizer", None)  # for stop strings; `generate` hands it on to the model as well
        cache = kwargs.get(CACHE)
        first = is_first_iteration or (cache is not None and _cached_tokens(cache) == 0)
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=first, **kwargs
        )

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor | None,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """For beams and samples: each row's items repeat as a group, A B -> A B A B, where its row repeats."""
        expanded = {}
        for name, encoded in mm_encoder_output.items():
            counts = self.model.placeholders(name, input_ids, inputs_embeds).sum(-1).tolist()
            features, items = list(encoded.pooler_output), []
            for count in counts:
                row: list[torch.Tensor] = []
                while features and sum(map(len, row)) < count:
                    row.append(features.pop(0))
                items += row * expand_size
            expanded[name] = BaseModelOutputWithPooling(pooler_output=items)
        return expanded


LOSS_KWARGS = ("num_items_in_batch", "shift_labels", "unseen")
"""What is for the loss alone."""

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""What moves along when the padding of a batch is moved."""


def _take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """[B, L, ...] in another order of its L tokens, int64[B, L]."""
    return torch.take_along_dim(tensor, order.reshape(*order.shape, *[1] * (tensor.ndim - 2)), dim=1)


def _embedding_name(model: nn.Module) -> str:
    """Name of the Thinker's input embedding weight, which differs from family to family."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _shape_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some families do to their logits: scale (Cohere), divide (Granite), cap softly (Gemma 2)."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class _ReplayedOutput(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Families pass on fields of their own (cross attentions, router logits); here they are empty."""


class _Replay(nn.Module):
    """Stands in for a language model's decoder and returns given hidden states."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    @property
    def decoder(self) -> "_Replay":
        """Where OPT's stock class looks for it."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _ReplayedOutput(last_hidden_state=self.hidden_states)


def _stock_head(config: Any) -> nn.Linear:
    """An output head like that of the stock causal language model, if ours gives the same logits as it.

    The stock class runs for real, but on hidden states made up here and with a vocabulary of a few words, so that the
    question "what does this family do after the decoder?" is answered by the family itself, at no cost.

    Raises:
        ValueError: a language model whose head does what we do not; its logits would be silently wrong.
    """
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=repr)
    if key not in _STOCK_HEADS:
        _STOCK_HEADS[key] = _ask_stock_head(config)
    in_features, out_features, bias = _STOCK_HEADS[key]
    return nn.Linear(in_features, out_features, bias=bias)


_STOCK_HEADS: dict[tuple[type, str], tuple[int, int, bool]] = {}
"""What was found out, by configuration: asking takes a tenth of loading a small model."""


def _ask_stock_head(config: Any) -> tuple[int, int, bool]:
    """Widths of the head, and whether it has a bias."""
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(_of_one_layer(config))
    head = stock.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"The output head of {type(stock).__name__} is a {type(head).__name__}; only nn.Linear is supported."
        )
    bias = head.bias is not None
    # on the CPU and in float32, also where from_pretrained builds everything else on "meta" or in half precision
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(1, 3, head.in_features, generator=generator, dtype=torch.float32)
        small = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # draws nothing
            nn.Linear, head.in_features, 8, bias=bias, dtype=torch.float32
        )
        for parameter in small.parameters():  # large logits: a cap would show
            parameter.data = 10 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        setattr(stock, stock.base_model_prefix, _Replay(hidden_states))
        stock.set_output_embeddings(small)
        try:
            expected = stock(inputs_embeds=hidden_states, attention_mask=torch.ones(1, 3)).logits
        except Exception as error:
            raise ValueError(f"{type(stock).__name__} cannot be used as a Thinker: {error}") from error
        same = torch.allclose(expected, _shape_logits(small(hidden_states), config), rtol=1e-4, atol=1e-4)
    if not same:
        raise ValueError(
            f"The output head of {type(stock).__name__} does more than a matrix product, and not what omni knows "
            "(scaling, soft capping, bias): its logits would be wrong. Choose another language model."
        )
    return head.in_features, head.out_features, bias


def _of_one_layer(config: Any) -> Any:
    """A copy with one layer, where all are of one kind: the head is the same, and many layers take long to build."""
    config = copy.deepcopy(config)
    per_layer = [
        key
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == getattr(config, "num_hidden_layers", None)
    ]
    if per_layer in ([], ["layer_types"]):
        config.num_hidden_layers = 1
        if per_layer:
            config.layer_types = config.layer_types[:1]
    return config


def _labels_of(positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labels int64[n] that the logits of the n chosen positions, bool[B, L], are to predict."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if left_out := int(((following != -100) & ~positions).sum()):
        raise ValueError(
            f"{left_out} of {int((following != -100).sum())} labelled tokens follow positions that logits_to_keep "
            "leaves out, and would not be learnt; it must be true before every label."
        )
    return following[positions]


# --- The signature of forward follows the registry --------------------------------------------------------------------


def _with_inputs(function: Callable[..., Any], names: Sequence[str]) -> inspect.Signature:
    """The signature of forward with the inputs of all modalities spelled out before its **kwargs."""
    signature = inspect.signature(function, follow_wrapped=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=torch.Tensor | None)
        for name in names
    ]
    if CACHE not in signature.parameters:
        extra.append(inspect.Parameter(CACHE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Cache | None))
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *extra, *rest])


_PLAIN_SIGNATURES = {cls: inspect.signature(cls.forward) for cls in (OmniModel, OmniForConditionalGeneration)}


def _follow_registry() -> None:
    """generate, Trainer, peft and accelerate read from forward's signature what a model takes; keep it true.

    Done on the classes, so that copies and wrapped instances agree; with it come the `get_<name>_features` methods.
    """
    names = [key for modality in registered() for key in modality.inputs]
    for cls, plain in _PLAIN_SIGNATURES.items():
        cls.forward.__signature__ = plain
        cls.forward.__signature__ = _with_inputs(cls.forward, names)
        for modality in registered():
            method = f"get_{modality.name}_features"
            if method not in cls.__dict__:
                setattr(cls, method, _features_method(modality.name, tuple(modality.inputs)))


def _features_method(name: str, inputs: tuple[str, ...]) -> Callable[..., Any]:
    @can_return_tuple
    def get_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.get_features(name, **dict(zip(inputs, args, strict=False)), **kwargs)

    get_features.__name__ = f"get_{name}_features"
    get_features.__doc__ = f"Projected tokens of {name} items; see `get_features`."
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD) for key in inputs]
    parameters += [inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)]
    get_features.__signature__ = inspect.Signature(parameters)
    return get_features


on_change(_follow_registry)
