"""`generate` for a fused model: padding to the left, items encoded once, no placeholders in answers."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from omni.registry import get_modality

from . import acceleration
from .placement import check_counts
from .selection import take
from .signature import CACHE, named_cache
from .thinker import cached_tokens, untrained_message

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs with one value per token. They move when padding moves."""


class NoPlaceholders(SuppressTokensLogitsProcessor):
    """Placeholders get no probability. A placeholder in an answer would stand for an item that nobody gave.

    It is a subclass, because a given processor replaces `generate`'s own of the same class, for `suppress_tokens`.
    """


class OmniGenerationMixin(GenerationMixin):
    """`generate` for the fused model. The class that uses it has `config` and `model`, an `OmniModel`."""

    config: Any
    model: Any

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        *args: Any,
        allow_untrained: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`. Prompts may be padded on either side; those that it returns are padded on the left.

        Args:
            inputs, generation_config, logits_processor, args, kwargs: as there.
            allow_untrained: generate although parts of the model have random weights.

        Raises:
            ValueError: a part that is needed is untrained (a tower and its projector are needed for an item of theirs);
                placeholders and items do not match in some row.
        """
        kwargs = named_cache(kwargs)
        if not allow_untrained:
            self._refuse_untrained(kwargs)
        if inputs is not None and kwargs.get("input_ids") is None:
            inputs, kwargs["input_ids"] = None, inputs
        kwargs |= self._padded_on_the_left(kwargs)
        kwargs["mm_encoder_outputs"] = self._encode_once(kwargs)
        if token_ids := [section["token_id"] for section in self.config.modalities.values()]:
            logits_processor = LogitsProcessorList([NoPlaceholders(token_ids, self.device), *(logits_processor or [])])
        with acceleration.current().writing(self.model.language_model):
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def _refuse_untrained(self, inputs: Mapping[str, Any]) -> None:
        encoded = inputs.get("mm_encoder_outputs") or {}
        needless = {
            f"{name}_{part}"
            for name in self.config.modalities
            if encoded.get(name) is None and all(inputs.get(key) is None for key in get_modality(name).inputs)
            for part in ("tower", "projector")
        }
        if random := [part for part in self.config.untrained or [] if part not in needless]:
            raise ValueError(
                f"{untrained_message(random)} Train them, or pass allow_untrained=True to generate anyway."
            )

    def _padded_on_the_left(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The inputs with one value per token, padding first: no row has a gap between its prompt and its answer.

        Empty if padding cannot or need not move.
        """
        ids, embeds, mask = (inputs.get(key) for key in ("input_ids", "inputs_embeds", "attention_mask"))
        main = embeds if embeds is not None else ids
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        known = pad is not None and pad not in (eos if isinstance(eos, list) else [eos])
        if mask is None and embeds is None and ids is not None and known:
            mask = ids != pad  # as transformers will assume
        if main is None or mask is None or mask.shape != main.shape[:2] or cached_tokens(inputs.get(CACHE)) != 0:
            return {}
        if any((self.model.placeholders(m, ids, embeds) & (mask == 0)).any() for m in self.config.modalities):
            return {}  # masked items are not padding; their order must stay
        order = (mask != 0).int().argsort(dim=1, stable=True)  # padding first, the rest in its order
        per_token = {key: inputs[key] for key in PER_TOKEN if inputs.get(key) is not None}
        return {key: take(value, order) for key, value in per_token.items() if value.shape[:2] == mask.shape}

    def _encode_once(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take the items out of the inputs and encode them. Counts are checked before beams or chunks change the rows."""
        with acceleration.current().encoding():
            encoded_items: dict[str, Any] = self.model.encode(inputs, inputs.pop("mm_encoder_outputs", None))
        ids, embeds = (inputs.get(key) for key in ("input_ids", "inputs_embeds"))
        starts = cached_tokens(inputs.get(CACHE)) == 0 and (ids is not None or embeds is not None)
        for name in self.config.modalities if starts else ():
            encoded = encoded_items.get(name)
            lengths = [len(item) for item in encoded.pooler_output] if encoded is not None else []
            check_counts(name, self.model.placeholders(name, ids if embeds is None else None, embeds), lengths)
        return encoded_items

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; any step on an empty cache counts as the first.

        transformers does not mark the first step of a drafting assistant, which would then lose its items.
        """
        kwargs.pop("tokenizer", None)  # it is for stop strings; `generate` passes it to the model as well
        cache = kwargs.get(CACHE)
        first = is_first_iteration or (cache is not None and cached_tokens(cache) == 0)
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
        """Repeat a row's items with the row, for beams and samples: A B -> A B A B. transformers repeats only pictures."""
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
