"""What `omni.fusion.acceleration` gets from here: generation on a CPU, and training in bfloat16 there."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from omni.fusion.acceleration import Acceleration

from .generation import OneDnnProducts, RoomyCache, prefilling, quick_step, stepping

WRITTEN_OUT = ("omni_vision",)
"""Model types that learn faster with attention written out, on CPUs in bfloat16: two products take a third of the time of
sdpa's kernel, backward included."""


class FastAcceleration(Acceleration):
    """The answers of `omni.fast.generation`."""

    def encoding(self) -> AbstractContextManager[Any]:
        """Products of many rows by oneDNN."""
        return OneDnnProducts()

    def writing(self, language_model: Any) -> AbstractContextManager[Any]:
        """Have quick steps where the Thinker is known."""
        return stepping(language_model)

    def reading(self) -> AbstractContextManager[Any]:
        """Products by oneDNN where there is no quick step, which has them by itself."""
        return prefilling()

    def step(
        self,
        language_model: Any,
        hidden: torch.Tensor,
        mask: Any,
        positions: torch.Tensor | None,
        cache: Cache | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor | None:
        """A quick step where there is one."""
        step = quick_step(language_model, cache, hidden, mask, options)
        if step is None or cache is None:
            return None
        return step(hidden, mask, positions, cache)

    def cache(self, config: Any) -> DynamicCache:
        """A cache with room for what comes."""
        return RoomyCache(config)

    def prepare_training(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Have attention written out where that is faster and nobody chose otherwise."""
        if device.type != "cpu" or dtype != torch.bfloat16:
            return
        for module in model.modules():
            if not isinstance(module, PreTrainedModel) or module.config.model_type not in WRITTEN_OUT:
                continue
            if module.config._attn_implementation == "sdpa":
                module.set_attn_implementation("eager")
