"""The hooks of `generate` that a fused model needs: padding to the left, items encoded once, no placeholders in answers."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from omni.registry import get_modality

from . import acceleration
from .placement import check_counts
from .selection import take
from .signature import CACHE
from .thinker import cached_tokens, untrained_message

PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs with one value per token. They move when padding moves."""


class OmniGenerationMixin(GenerationMixin):
    """`generate` for the fused model. The class that uses it has `config` and `model`, an `OmniModel`."""

    config: Any
    model: Any

    def generate(self, *args: Any, allow_untrained: bool = False, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`. Prompts may be padded on either side; those that it returns are padded on the left.

        Args:
            allow_untrained: generate although parts of the model have random weights.

        Raises:
            ValueError: a part that is needed is untrained. A tower and its projector are needed for an item of theirs.
        """
        encoded = kwargs.get("mm_encoder_outputs") or {}
        needless = {
            f"{name}_{part}"
            for name in self.config.modalities
            if encoded.get(name) is None and all(kwargs.get(key) is None for key in get_modality(name).inputs)
            for part in ("tower", "projector")
        }
        if not allow_untrained and (random := [part for part in self.config.untrained or [] if part not in needless]):
            raise ValueError(
                f"{untrained_message(random)} Train them, or pass allow_untrained=True to generate anyway."
            )
        with acceleration.current().writing(self.model.language_model):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Replace transformers' own growing cache by that of `acceleration`."""
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache: Any = model_kwargs.get(CACHE)
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs[CACHE] = acceleration.current().cache(self.config.get_text_config(decoder=True))

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        """Move padding to the left, so that no row has a gap between its prompt and its answer."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get(CACHE)
        pad, eos = self.generation_config.pad_token_id, self.generation_config.eos_token_id
        if (
            mask is None
            and name == "input_ids"
            and pad is not None
            and pad not in (eos if isinstance(eos, list) else [eos])
        ):
            mask = inputs != pad  # as transformers will assume
        if mask is None or mask.shape != inputs.shape[:2] or cached_tokens(cache) != 0:
            return inputs, name, model_kwargs
        ids, embeds = (inputs, None) if name == "input_ids" else (model_kwargs.get("input_ids"), inputs)
        if any((self.model.placeholders(m, ids, embeds) & (mask == 0)).any() for m in self.config.modalities):
            return inputs, name, model_kwargs  # masked items are not padding; their order must stay
        order = (mask != 0).int().argsort(dim=1, stable=True)  # padding first, the rest in its order
        for key in PER_TOKEN:
            if (value := model_kwargs.get(key)) is not None and value.shape[:2] == mask.shape:
                model_kwargs[key] = take(value, order)
        return take(inputs, order), name, model_kwargs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """Write no placeholder: it would stand for an item that nobody gave."""
        processors = super()._get_logits_processor(*args, **kwargs)
        token_ids = [section["token_id"] for section in self.config.modalities.values()]
        if token_ids:  # first, so that top-k and the like choose among the other tokens
            processors.insert(0, SuppressTokensLogitsProcessor(token_ids, device=kwargs.get("device") or "cpu"))
        return processors

    # transformers encodes and repeats items of pictures and videos alone; here it is every modality

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Encode every item once, before the first step, and check the counts: beams repeat rows, and chunks cut them."""
        with acceleration.current().encoding():
            encoded_items = self.model.encode(model_kwargs, model_kwargs.pop("mm_encoder_outputs", None))
        if encoded_items:
            model_kwargs["mm_encoder_outputs"] = encoded_items
        ids, embeds = (inputs_tensor, None) if inputs_tensor.ndim == 2 else (None, inputs_tensor)
        for name in self.config.modalities if cached_tokens(model_kwargs.get(CACHE)) == 0 else ():
            encoded = encoded_items.get(name)
            lengths = [len(item) for item in encoded.pooler_output] if encoded is not None else []
            check_counts(name, self.model.placeholders(name, ids, embeds), lengths)
        return model_kwargs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """A step on an empty cache is the first one. transformers does not mark it for a drafting assistant, whose items
        would be lost.
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
        """Repeat a row's items with the row, for beams and samples: A B -> A B A B."""
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
