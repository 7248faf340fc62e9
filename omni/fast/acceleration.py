"""The acceleration for `omni.fusion.acceleration`: generation and training on a CPU."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from omni.fusion.acceleration import Acceleration

from . import attention
from .cache import give_room
from .generation import prefilling, quick_step, stepping
from .products import OneDnnProducts, keep_memory, learnt_products

WRITTEN_OUT = {
    "omni_vision": "eager",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), attention.NAME),
}
"""By model type the attention that trains faster on CPUs in bfloat16. Two products take a third to a half of the time of
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
        """Products and attention where they are faster on a CPU, and the user has not chosen an attention.

        In float32, oneDNN computes linear layers and their gradients. In bfloat16, attention is two products: of an
        encoder that computes in it, and of a frozen language model whose weights are in it.
        """
        with ExitStack() as stack:
            if device.type == "cpu":
                keep_memory()
                modules: list[Any] = [*model.modules()]
                for module in modules:
                    if name := _written_out(module, dtype):
                        stack.callback(module.set_attn_implementation, "sdpa")
                        module.set_attn_implementation(name)
            if device.type == "cpu" and dtype == torch.float32:
                stack.enter_context(learnt_products(model))
            yield


def _written_out(module: Any, dtype: torch.dtype) -> str | None:
    """The attention with which a model trains faster, or None."""
    if not isinstance(module, PreTrainedModel) or module.config._attn_implementation != "sdpa":
        return None
    name = WRITTEN_OUT.get(module.config.model_type)
    computed_in = module.dtype if name == attention.NAME else dtype
    return name if computed_in == torch.bfloat16 else None
