"""The fused model: encoders of any modality, their projectors, and a causal language model, the Thinker.

Shapes: B rows, L tokens in a row, T width of the Thinker, V vocabulary; per modality I items over all rows, and n_i
tokens that item i becomes (the token plan, `OmniConfig.num_tokens`).

    input_ids (B, L) ─▶ embed ─▶ (B, L, T) ─────────────▶ place at the placeholders ─▶ Thinker ─▶ logits (B, L, V)
    pixel_values (I, 3, H, W) ─▶ image_tower ─▶ image_projector ─▶ I x (n_i, T) ──┘

Parts have the names that transformers, its exporters and vLLM look for: `<name>_tower`, `<name>_projector`,
`language_model`, `lm_head`, and a method `get_<name>_features` for each modality.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from omni.projectors import PROJECTORS
from omni.registry import get_modality

from .configuration_omni import OmniConfig
from .encoded_item import EncodedItem
from .encoding import place, project, run_tower
from .generation import OmniGenerationMixin
from .head import embedding_name, shape_logits, stock_head
from .pretrained import OmniCausalLMOutputWithPast, OmniModelOutputWithPast, OmniPreTrainedModel
from .selection import keep, keep_labels
from .signature import CACHE, cache_by_either_name, follow_registry
from .thinker import per_layer_inputs, refuse_unknown, starts_rows, think

Encoded = Mapping[str, ModelOutput | Sequence[EncodedItem]]


class OmniModel(OmniPreTrainedModel):
    """Encoders, projectors and the Thinker without its head."""

    left_to_others = re.compile(r"lm_head\.")  # a checkpoint with a head serves the base model too

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        for name, section in config.modalities.items():
            modality, encoder = get_modality(name), section["encoder"]
            projector = PROJECTORS[section["projector"]](
                hidden_size=encoder.hidden_size,
                text_hidden_size=config.text_config.hidden_size,
                grid_dims=modality.grid_dims,
                **{key: value for key, value in section.items() if key not in ("encoder", "token_id", "projector")},
            )
            setattr(self, f"{name}_tower", modality.build_tower(encoder))
            setattr(self, f"{name}_projector", projector)
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
            TypeError: an argument that neither a modality nor the Thinker has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        encoded = self.encode(kwargs, mm_encoder_outputs)
        refuse_unknown(self, kwargs)
        kwargs |= per_layer_inputs(self, input_ids)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        starts = starts_rows(self, attention_mask, past_key_values)
        placed = {}
        for name in self.config.modalities:
            if name in encoded or starts:
                features = encoded[name].pooler_output if name in encoded else []
                placeholders = self.placeholders(name, input_ids, inputs_embeds)
                inputs_embeds, placed[name] = place(name, placeholders, features, inputs_embeds)
        outputs = think(self.language_model, inputs_embeds, attention_mask, position_ids, past_key_values, kwargs)
        return OmniModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            encoder_hidden_states={name: tokens for name, tokens in placed.items() if tokens is not None} or None,
            **{CACHE: outputs.get(CACHE)},
        )

    def encode(self, inputs: dict[str, Any], encoded: Encoded | None = None) -> dict[str, ModelOutput]:
        """Encode and project the items of every modality, and take their inputs out of `inputs`.

        `encoded` holds items that are encoded already; they are projected where they are not. Raises `ValueError` if the
        model lacks their modality, or if items of a modality come both raw and encoded.
        """
        given = {name: output for name, output in (encoded or {}).items() if output is not None}
        if unknown := sorted(set(given) - set(self.config.modalities)):
            raise ValueError(f"Encoded items of {unknown}, but this model has {sorted(self.config.modalities)}.")
        result: dict[str, ModelOutput] = {}
        for name in self.config.modalities:
            raw = {key: inputs.pop(key) for key in get_modality(name).inputs if key in inputs}
            raw = {key: value for key, value in raw.items() if value is not None}
            if raw and name in given:
                raise ValueError(f"The items of modality {name!r} came twice: raw ({sorted(raw)}) and encoded.")
            if raw:
                result[name] = self.get_features(name, **raw)
            elif isinstance(output := given.get(name), ModelOutput):
                result[name] = output
            elif output is not None:
                result[name] = BaseModelOutputWithPooling(pooler_output=self.project(name, output))
        return result

    def get_features(self, name: str, **inputs: Any) -> BaseModelOutputWithPooling:
        """Encode and project the items of one modality, from inputs such as `pixel_values` float[I, 3, H, W].

        Returns:
            The encoder's output, with `pooler_output` the list of each item's projected tokens, float[n_i, T].
        """
        encoded, items = run_tower(name, self.config.modalities[name], getattr(self, f"{name}_tower"), inputs)
        return BaseModelOutputWithPooling(
            last_hidden_state=encoded.get("last_hidden_state"),
            pooler_output=self.project(name, items),
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
        )

    def encode_items(self, name: str, **inputs: Any) -> list[EncodedItem]:
        """The items of one modality as its encoder leaves them, from the same inputs. `project` takes them."""
        return run_tower(name, self.config.modalities[name], getattr(self, f"{name}_tower"), inputs)[1]

    def project(self, name: str, items: Sequence[EncodedItem]) -> list[torch.Tensor]:
        """Tokens of the Thinker, float[n_i, T] for each encoded item."""
        return project(self.config.modalities[name], getattr(self, f"{name}_projector"), items)

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
    """The fused model with its output head: it reads text and items, and writes text."""

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.model = OmniModel(config)
        self.lm_head = stock_head(config.text_config)
        self._tied_weights_keys = {"lm_head.weight": f"model.{embedding_name(self.model)}"}
        self.post_init()

    @can_return_tuple
    @cache_by_either_name
    def forward(
        self, *args: Any, labels: torch.Tensor | None = None, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any
    ) -> OmniCausalLMOutputWithPast:
        """As `OmniModel.forward`, whose arguments it takes; then logits, and the loss where there are labels.

        Args:
            labels: int64[B, L], -100 where nothing is to be learnt.
            logits_to_keep: only the last so many positions; 0 for all. Or positions, int64[n] or int64[B, n]; logits are
                then float[B, n, V]. Or bool[B, L]: the n positions where it is true; logits are then float[n, V]. Training
                needs those before a label alone.
            kwargs: `unseen` int64[B, L] and `num_items_in_batch` are for a `loss_function` of the caller's.

        Raises:
            ValueError: see `OmniModel.forward`, and a label of a position that `logits_to_keep` leaves out.
        """
        loss_kwargs = {key: kwargs.pop(key) for key in LOSS_KWARGS if key in kwargs}
        outputs = self.model(*args, **kwargs)
        hidden_states = keep(outputs.last_hidden_state, logits_to_keep)
        logits = shape_logits(self.lm_head(hidden_states), self.config.text_config)
        loss = None
        if labels is not None:
            loss_kwargs |= keep_labels(labels, logits_to_keep, loss_kwargs)
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
"""Arguments of the loss alone."""

follow_registry(OmniModel, OmniForConditionalGeneration)
