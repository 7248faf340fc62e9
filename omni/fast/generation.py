"""Faster generation on a CPU. `install.py` puts it where `generate` asks for it.

Encoding and reading the prompt are products of many rows. `OneDnnProducts` passes them to oneDNN, for any tower, projector
or Thinker (`products.py`).

Writing takes a `QuickStep` for each token (`quick_step.py`). This module decides for which Thinkers and for which calls it
stands in.

All of this reads the model's own weights, so no copy can become stale. It is not for training, for other devices, or for
other precisions than float32.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache import RoomyLayer, give_room
from .products import OneDnnProducts
from .quick_step import Layer, QuickStep

TOLERANCE = 1e-4
"""Largest difference between the quick step and the model's own step, relative to the largest number."""


LAYERS = {
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}


_WRITING: ContextVar[bool] = ContextVar("writing", default=False)
_CURRENT: ContextVar[QuickStep | None] = ContextVar("quick step", default=None)
_KNOWN: WeakKeyDictionary[nn.Module, "_Known"] = WeakKeyDictionary()


@contextmanager
def stepping(language_model: Any) -> Iterator[None]:
    """Inside of the block, `quick_step` returns the step of this Thinker, if it has one.

    A Thinker has one if all of its parts are plain, known modules in float32 on the CPU. With adapters, quantised weights,
    hooks, other kernels, sliding windows or another architecture it has none. Nor has it one if the step differs by more
    than `TOLERANCE`, which is measured once, on random rows.
    """
    found = _step_of(language_model)
    step, writing = _CURRENT.set(found), _WRITING.set(True)
    try:
        yield
    finally:
        _CURRENT.reset(step)
        _WRITING.reset(writing)
        if found is not None and found.compiled is not None:
            found.compiled.release()


def prefilling() -> AbstractContextManager[Any]:
    """Products by oneDNN while `generate` reads a prompt. A quick step has them by itself, so it needs no context."""
    return OneDnnProducts() if _WRITING.get() and _CURRENT.get() is None else nullcontext()


def _step_of(language_model: Any) -> QuickStep | None:
    config = language_model.config
    if config.output_attentions or config.output_hidden_states or language_model.training:
        return None
    known = _KNOWN.get(language_model)
    if known is not None and known.still_holds(language_model):
        return known.step
    _KNOWN.pop(language_model, None)
    if not _is_plain(language_model):
        return None
    step = QuickStep(language_model)
    if _difference(step, language_model) > TOLERANCE:
        return None
    if step.compile() and not _difference(step, language_model) <= TOLERANCE:
        step.compiled = None
    _KNOWN[language_model] = _Known.of(step, language_model)
    return step


class _Known(NamedTuple):
    """A step, the modules of its Thinker without the Thinker itself, and the children of each, the Thinker's first."""

    step: QuickStep
    modules: list[nn.Module]
    children: list[tuple[nn.Module | None, ...]]

    @classmethod
    def of(cls, step: QuickStep, language_model: nn.Module) -> "_Known":
        _, *modules = language_model.modules()
        return cls(step, modules, [_children(module) for module in (language_model, *modules)])

    def still_holds(self, language_model: nn.Module) -> bool:
        """Whether the Thinker still has the same modules, and each does what its class says."""
        return all(
            not _is_changed(module) and _children(module) == children
            for module, children in zip((language_model, *self.modules), self.children, strict=True)
        )


def _children(module: nn.Module) -> tuple[nn.Module | None, ...]:
    return tuple(vars(module)["_modules"].values())


def quick_step(
    language_model: Any,
    cache: Cache | None,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    options: Mapping[str, Any],
) -> QuickStep | None:
    """The step for a forward pass of the Thinker with these arguments; None if the Thinker has to compute it.

    Args:
        language_model: the Thinker.
        cache: the Thinker's cache.
        hidden: float[B, n, T], the embedded tokens.
        mask: the attention mask.
        options: the other arguments.
    """
    step = _CURRENT.get()
    if (
        step is None
        or cache is None
        or step.norm is not language_model.norm
        or hidden.dtype != torch.float32
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or any(value is not None for key, value in options.items() if key not in ("use_cache", "return_dict"))
        or type(cache) is not DynamicCache
        or any(type(layer) not in (DynamicLayer, RoomyLayer) for layer in cache.layers)
    ):
        return None
    length = cache.get_seq_length() + hidden.shape[1]
    plain = mask is None or (isinstance(mask, torch.Tensor) and mask.shape == (len(hidden), length))
    return step if plain else None


def _is_plain(language_model: Any) -> bool:
    config, layers = language_model.config, getattr(language_model, "layers", None)
    if not layers or any(f"{type(layer).__module__}.{type(layer).__qualname__}" not in LAYERS for layer in layers):
        return False
    windows = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if windows or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    if any(type(linear) is not nn.Linear for layer in layers for linear in Layer.of(layer).linears()):
        return False
    return not any(map(_is_changed, language_model.modules()))


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more than its class says, or computes on another device or in another precision."""
    own: Any = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
        return True
    for weight in own["_parameters"].values():
        if weight is not None and not (
            type(weight) is nn.Parameter and weight.dtype is torch.float32 and weight.is_cpu
        ):
            return True
    return False


@torch.no_grad()
def _difference(step: QuickStep, language_model: Any) -> float:
    """The step's difference from the model, relative to the largest number, on two rows of which one has padding."""
    generator, width = torch.Generator("cpu").manual_seed(0), language_model.config.hidden_size
    rows = torch.randn(2, 4, width, generator=generator, dtype=torch.float32, device="cpu")
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], device="cpu")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = language_model(inputs_embeds=rows, attention_mask=mask, position_ids=positions).last_hidden_state
    cache = give_room(DynamicCache(config=language_model.config))
    prompt = step(rows[:, :3], mask[:, :3], positions[:, :3], cache)
    found = torch.cat([prompt, step(rows[:, 3:], mask, positions[:, 3:], cache)], dim=1)
    return float((found - expected)[mask.bool()].abs().max() / expected.abs().max())
