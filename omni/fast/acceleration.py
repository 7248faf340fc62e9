"""The acceleration for `omni.fusion.acceleration`: generation on a CPU, and training in bfloat16 on a CPU."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from omni.fusion.acceleration import Acceleration

from .generation import OneDnnProducts, give_room, prefilling, quick_step, stepping

WRITTEN_OUT = ("omni_vision",)
"""Model types that train faster with eager attention on CPUs in bfloat16: forward and backward of its two products take a
third of the time of sdpa's kernel."""


class FastAcceleration(Acceleration):
    """Faster forms of the reference's methods, from `omni.fast.generation`."""

    def encoding(self) -> AbstractContextManager[Any]:
        """oneDNN computes products of many rows."""
        return OneDnnProducts()

    def writing(self, language_model: Any) -> AbstractContextManager[Any]:
        """Quick steps for a Thinker of a known architecture."""
        return stepping(language_model)

    def reading(self) -> AbstractContextManager[Any]:
        """oneDNN computes products, unless a quick step does."""
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
        """The quick step, if there is one. A new cache gets room for further tokens, for any Thinker."""
        give_room(cache)
        step = quick_step(language_model, cache, hidden, mask, options)
        if step is None or cache is None:
            return None
        return step(hidden, mask, positions, cache)

    def prepare_training(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Use eager attention where that is faster and the user has not chosen another."""
        if device.type != "cpu" or dtype != torch.bfloat16:
            return
        for module in model.modules():
            if not isinstance(module, PreTrainedModel) or module.config.model_type not in WRITTEN_OUT:
                continue
            if module.config._attn_implementation == "sdpa":
                module.set_attn_implementation("eager")
