"""The one place where speed may enter.

The fused model and `Session` compute with torch's modules and transformers' caches. Where the same result can be had
sooner, they ask `current()`. The `Acceleration` of this file is the reference: it changes nothing.

A faster one is a subclass. It overrides the methods that it has a faster way for, and `install` puts it in place. omni's
own is in `omni/fast`; `omni/__init__.py` installs it unless that folder is deleted. A subclass gives the same results up to
rounding, and leaves a model that it does not know to the reference.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache


class Acceleration:
    """One method for each place where speed may enter. These are the reference's."""

    def encoding(self) -> AbstractContextManager[Any]:
        """A context in which items are encoded and projected, without gradients."""
        return nullcontext()

    def writing(self, language_model: Any) -> AbstractContextManager[Any]:
        """A context in which `generate` writes with this Thinker."""
        return nullcontext()

    def reading(self) -> AbstractContextManager[Any]:
        """A context in which the Thinker reads more than one token of a row, such as a prompt."""
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
            mask: int64[B, L] over all L tokens, including those in the cache; None; or another form that the Thinker takes.
            positions: int64[B, n]; None to count them from the start of the row.
            cache: the Thinker's cache.
            options: its other arguments.

        Returns:
            The last hidden state, float[B, n, T], or None.
        """
        return None

    def training(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """A context in which a model is trained on this device in this precision."""
        return nullcontext()


_installed = Acceleration()
_used: ContextVar[Acceleration | None] = ContextVar("acceleration", default=None)


def current() -> Acceleration:
    """The acceleration in use."""
    return _used.get() or _installed


def install(acceleration: Acceleration) -> None:
    """Use this acceleration in all threads."""
    global _installed
    _installed = acceleration


@contextmanager
def using(acceleration: Acceleration) -> Iterator[None]:
    """Use this acceleration inside of the block, in this thread. `using(Acceleration())` is the reference."""
    token = _used.set(acceleration)
    try:
        yield
    finally:
        _used.reset(token)
