"""The acceleration for `omni.fusion.acceleration`: generation and training on a CPU."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from omni.fusion.acceleration import Acceleration

from .generation import give_room, prefilling, quick_step, stepping
from .products import OneDnnProducts, keep_memory

WRITTEN_OUT = ("omni_vision",)
"""Model types that train faster with eager attention on CPUs in bfloat16. Its two products take a third of the time of
sdpa's kernel, including the backward pass."""


class FastAcceleration(Acceleration):
    """The reference's methods, by `omni.fast.generation` and `omni.fast.products`."""

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

    @contextmanager
    def training(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Products and attention where they are faster on a CPU.

        In float32, oneDNN computes linear layers and their gradients. In bfloat16, encoders use eager attention where that
        is faster and the user has not chosen another.
        """
        with ExitStack() as stack:
            if device.type == "cpu":
                keep_memory()
            if device.type == "cpu" and dtype == torch.float32:
                stack.enter_context(OneDnnProducts(learning=True))
            if device.type == "cpu" and dtype == torch.bfloat16:
                encoders: list[Any] = [module for module in model.modules() if _writes_out(module)]
                for encoder in encoders:
                    stack.callback(encoder.set_attn_implementation, "sdpa")
                    encoder.set_attn_implementation("eager")
            yield


def _writes_out(module: Any) -> bool:
    if not isinstance(module, PreTrainedModel) or module.config.model_type not in WRITTEN_OUT:
        return False
    return bool(module.config._attn_implementation == "sdpa")
