"""A cache of keys and values with room for further tokens, for the step of `quick_step.py`."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64
"""The smallest number of tokens that a layer of the cache makes room for at once."""


def give_room(cache: Any) -> Any:
    """Give an empty `DynamicCache` of transformers room for further tokens. Other caches are returned unchanged."""
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values, float[B, G, L, D], at the beginning of longer tensors.

    transformers' own layer copies everything it holds for each new token.
    """

    def __init__(self) -> None:
        super().__init__()
        self._longer: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, float[B, G, n, D]. Returns all that the layer holds."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and key_states.requires_grad):
            both: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        held = self.get_seq_length()
        keys, values = self.extend(key_states, value_states)
        keys[..., held : self.keys.shape[-2], :] = key_states
        values[..., held : self.values.shape[-2], :] = value_states
        return self.keys, self.values

    def extend(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for n more tokens. The caller writes their keys and values, float[B, G, n, D].

        Returns:
            The longer tensors, float[B, G, room, D].
        """
        held = self.get_seq_length()
        length = held + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self._has_room(length):
            room = length + max(ROOM, length // 2)
            self._longer = [new.new_empty(*new.shape[:-2], room, new.shape[-1]) for new in (key_states, value_states)]
            if held:
                self._longer[0][..., :held, :] = self.keys  # type: ignore[has-type]
                self._longer[1][..., :held, :] = self.values  # type: ignore[has-type]
        keys, values = self._longer
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return keys, values

    def _has_room(self, length: int) -> bool:
        """Whether keys and values are still the beginning of the longer tensors. Beams, for one, replace them."""
        if not self._longer or self._longer[0].shape[-2] < length:
            return False
        if self._longer[0].is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch refuses to write into it
        return all(
            part.data_ptr() == longer.data_ptr() and part.stride() == longer.stride() and len(part) == len(longer)
            for part, longer in zip((self.keys, self.values), self._longer, strict=True)
        )
