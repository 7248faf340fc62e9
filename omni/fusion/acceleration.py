"""The one seam through which speed may enter.

The fused model and `Session` compute with torch's modules and transformers' caches. At the few points where the same may be
had faster, they ask `current()`, and the `Acceleration` of this file answers: go on as usual. It is the reference.

Something faster subclasses `Acceleration`, overrides what it can do better, and is put in by `install`. omni's own lies in
`omni/fast`; `omni/__init__.py` has it put in where it is there. Whatever is put in gives the same results up to rounding,
and steps aside for a model that it does not know.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache


class Acceleration:
    """What is asked at each point; every answer here is that of the reference."""

    def encoding(self) -> AbstractContextManager[Any]:
        """A context in which items are encoded and projected, without gradients."""
        return nullcontext()

    def writing(self, language_model: Any) -> AbstractContextManager[Any]:
        """A context in which `generate` writes with this Thinker."""
        return nullcontext()

    def reading(self) -> AbstractContextManager[Any]:
        """A context in which the Thinker reads a prompt."""
        return nullcontext()

    def step(
        self,
        language_model: Any,
        hidden: torch.Tensor,
        mask: Any,
        positions: torch.Tensor | None,
        cache: Cache | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor | None:
        """A forward pass of the Thinker, with the cache extended; None to let the Thinker do it.

        Args:
            language_model: the Thinker.
            hidden: float[B, n, T], the embedded tokens.
            mask: int64[B, L] over all L tokens, those in the cache included; None; or another form that the Thinker takes.
            positions: int64[B, n]; None for the places where the tokens stand.
            cache: what the Thinker has read.
            options: its other arguments.

        Returns:
            The last hidden state, float[B, n, T], or None.
        """
        return None

    def cache(self, config: Any) -> DynamicCache:
        """An empty cache that grows, for a Thinker of this configuration."""
        return DynamicCache(config=config)

    def prepare_training(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Called once for a model that is about to be trained on this device, with products in this precision."""


_installed = Acceleration()
_used: ContextVar[Acceleration | None] = ContextVar("acceleration", default=None)


def current() -> Acceleration:
    """The acceleration in use."""
    return _used.get() or _installed


def install(acceleration: Acceleration) -> None:
    """Use this one from now on, in all threads."""
    global _installed
    _installed = acceleration


@contextmanager
def using(acceleration: Acceleration) -> Iterator[None]:
    """Inside, and in this thread, use this one: `using(Acceleration())` is the reference."""
    token = _used.set(acceleration)
    try:
        yield
    finally:
        _used.reset(token)
