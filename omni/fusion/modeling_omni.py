"""The fused model: encoders of any modality, their projectors, and a causal language model, the Thinker.

Shapes: B rows, L tokens in a row, T width of the Thinker, V vocabulary; per modality I items over all rows, and n_i
tokens that item i becomes (the token plan, `OmniConfig.num_tokens`).

    input_ids (B, L) ─▶ embed ─▶ (B, L, T) ─────────────▶ place at the placeholders ─▶ Thinker ─▶ logits (B, L, V)
    pixel_values (I, 3, H, W) ─▶ image_tower ─▶ image_projector ─▶ I x (n_i, T) ──┘

Parts have the names that transformers, its exporters and vLLM look for: `<name>_tower`, `<name>_projector`,
`language_model`, `lm_head`, and a method `get_<name>_features` for each modality.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from omni.checkpoints.strict import StrictLoadingMixin
from omni.projectors import PROJECTORS, compute_dtype
from omni.registry import get_modality

from . import acceleration
from .configuration_omni import OmniConfig
from .encoded_item import EncodedItem
from .generation import OmniGenerationMixin, take
from .head import shape_logits, stock_head
from .placement import check_counts
from .quantization import spare_small_parts
from .signature import CACHE, cache_by_either_name, follow_registry
from .thinker import (
    attention_for_maps,
    cached_tokens,
    is_served,
    positions_of,
    readable_mask,
    refuse_unknown,
    untrained_message,
)

Encoded = Mapping[str, ModelOutput | Sequence[EncodedItem]]

TokensOf = Callable[[tuple[int, ...], list[int]], dict[str, torch.Tensor]]
"""From a grid and the numbers of the items that have it to the encoder's tokens of these, by their names."""


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
            ours = type(encoder) is modality.config_class  # of others, the bundle or transformers knows the model
            build = modality.model_class if ours else modality.build or AutoModel.from_config
            setattr(self, f"{name}_tower", build(encoder))
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
    @cache_by_either_name
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
        refuse_unknown(self, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        served = is_served(self.language_model.config, attention_mask)
        if served and self.config.untrained and not self.training:
            raise ValueError(
                f"{untrained_message(self.config.untrained)} Train them before they are served, or empty `untrained` in "
                "config.json."
            )
        first = cached_tokens(past_key_values) == 0 and not served
        placed = {}
        for name in self.config.modalities:
            if name in encoded or first:
                features = encoded[name].pooler_output if name in encoded else []
                inputs_embeds, placed[name] = self.place(name, features, input_ids, inputs_embeds)
        if position_ids is None:
            position_ids = positions_of(attention_mask, past_key_values, inputs_embeds.shape[1])
        if not torch.compiler.is_compiling():
            done = acceleration.current().step(
                self.language_model, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs
            )
            if done is not None:
                return OmniModelOutputWithPast(last_hidden_state=done, **{CACHE: past_key_values})
        with attention_for_maps(self.language_model.config, kwargs):
            outputs = self.language_model(
                attention_mask=readable_mask(attention_mask, self.language_model.config, inputs_embeds.dtype),
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
        encoded, shapes = self._run_tower(name, inputs)
        by_shape = {shape: self._handed_on(name, encoded, shape) for shape in dict.fromkeys(shapes)}

        def tokens_of(shape: tuple[int, ...], members: list[int]) -> dict[str, torch.Tensor]:
            whole = len(members) == len(shapes)
            return {part: value if whole else value[members] for part, value in by_shape[shape].items()}

        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.get("last_hidden_state"),
            pooler_output=self._project(name, shapes, tokens_of),
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
        )

    def encode_items(self, name: str, **inputs: Any) -> list[EncodedItem]:
        """The items of one modality as its encoder leaves them, to be projected as often as is needed.

        Args:
            name: the modality.
            inputs: its inputs, such as `pixel_values` float[I, 3, H, W].
        """
        encoded, shapes = self._run_tower(name, inputs)
        tokens = [self._handed_on(name, encoded, shape) for shape in shapes]
        return [
            EncodedItem({part: value[i] for part, value in tokens[i].items()}, shape) for i, shape in enumerate(shapes)
        ]

    def project(self, name: str, items: Sequence[EncodedItem]) -> list[torch.Tensor]:
        """The tokens of encoded items in the Thinker's space, float[n_i, T] each."""
        if name not in self.config.modalities:
            raise ValueError(f"Encoded items of {[name]}, but this model has {sorted(self.config.modalities)}.")
        parts = self.config.modalities[name]["output"].split("+")
        device = next(getattr(self, f"{name}_projector").parameters()).device

        def tokens_of(shape: tuple[int, ...], members: list[int]) -> dict[str, torch.Tensor]:
            return {
                part: torch.stack([torch.as_tensor(items[i].tokens[part]) for i in members]).to(device)
                for part in parts
            }

        return self._project(name, [item.grid_shape for item in items], tokens_of)

    def _run_tower(self, name: str, inputs: Mapping[str, Any]) -> tuple[Any, list[tuple[int, ...]]]:
        """What the encoder of a modality returns, and the grid of each item."""
        modality, section, tower = get_modality(name), self.config.modalities[name], getattr(self, f"{name}_tower")
        if absent := [key for key in modality.inputs if inputs.get(key) is None]:
            raise ValueError(f"The encoder of modality {name!r} reads {list(modality.inputs)}; missing: {absent}.")
        arguments = {modality.arguments.get(key, key): value for key, value in inputs.items()} | {"return_dict": True}
        if section["output"] == "cls" and "cls_only" in inspect.signature(tower.forward).parameters:
            arguments["cls_only"] = True
        with attention_for_maps(tower.config, inputs):
            encoded = tower(**arguments)
        return encoded, [tuple(shape) for shape in modality.grid_shapes(section["encoder"], inputs)]

    def _handed_on(self, name: str, encoded: Any, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The named outputs of the encoder that the section hands to the projector, as of items with this grid."""
        output, patches = self.config.modalities[name]["output"], math.prod(shape)
        tokens = get_modality(name).read(encoded, patches)
        if lacking := [part for part in output.split("+") if part not in tokens]:
            raise ValueError(
                f"The encoder of modality {name!r} has no {lacking} for output {output!r}; it has {list(tokens)}."
            )
        # a batch of items of several lengths is padded to the longest: the item's own tokens come first
        return {part: tokens[part][:, :patches] if part == "grid" else tokens[part] for part in output.split("+")}

    def _project(self, name: str, shapes: Sequence[tuple[int, ...]], tokens_of: TokensOf) -> list[torch.Tensor]:
        """Tokens of the Thinker, float[n_i, T] for each item; items of one grid pass the projector together."""
        projector = getattr(self, f"{name}_projector")
        dtype = compute_dtype(projector)
        features: list[torch.Tensor] = [torch.empty(0)] * len(shapes)
        for shape in dict.fromkeys(shapes):
            members = [i for i, other in enumerate(shapes) if other == shape]
            tokens = {part: value.to(dtype=dtype) for part, value in tokens_of(shape, members).items()}
            for i, projected in zip(members, projector(tokens, shape), strict=True):
                features[i] = projected
        return features

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
            check_counts(name, mask, lengths)
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


class OmniForConditionalGeneration(OmniPreTrainedModel, OmniGenerationMixin):
    """The fused model with its output head: reads pictures (and whatever else is registered) and text, writes text."""

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.model = OmniModel(config)
        self.lm_head = stock_head(config.text_config)
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
    @cache_by_either_name
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
            logits_to_keep: only the last so many positions; 0 for all. Or positions, int64[n] or int64[B, n]; logits are
                then float[B, n, V]. Or bool[B, L]: the n positions where it is true, logits are then float[n, V]. Training
                needs no more than those before a label, a few of a row.
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
            hidden_states = take(hidden_states, logits_to_keep)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            hidden_states = hidden_states[:, kept]
        logits = shape_logits(self.lm_head(hidden_states), self.config.text_config)
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


LOSS_KWARGS = ("num_items_in_batch", "shift_labels", "unseen")
"""What is for the loss alone."""


def _embedding_name(model: nn.Module) -> str:
    """Name of the Thinker's input embedding weight, which differs from family to family."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def _labels_of(positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The labels int64[n] that the logits of the n chosen positions, bool[B, L], are to predict."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if left_out := int(((following != -100) & ~positions).sum()):
        raise ValueError(
            f"{left_out} of {int((following != -100).sum())} labelled tokens follow positions that logits_to_keep "
            "leaves out, and would not be learnt; it must be true before every label."
        )
    return following[positions]


follow_registry(OmniModel, OmniForConditionalGeneration)
