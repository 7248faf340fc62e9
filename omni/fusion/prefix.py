"""Prefix caching: if a prompt begins as the one before it did, the Thinker does not read these tokens again."""

from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class Prefix:
    """The tokens that a Thinker has read, and its cache of them.

    Args:
        config: the configuration of the fused model.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.cache: Any = None
        self._read: list[int] = []

    def share(self, ids: list[int]) -> bool:
        """Keep the tokens in the cache that this prompt also begins with, or start a new cache.

        Returns:
            Whether all items of the prompt are in the cache.
        """
        shared = 0
        for old, new in zip(self._read, ids[:-1], strict=False):  # at least one token must be read
            if old != new:
                break
            shared += 1
        placeholders = {section["token_id"] for section in self.config.modalities.values()}
        has_items = shared > 0 and can_be_cut(self.cache) and placeholders.isdisjoint(ids[shared:])
        if not has_items:
            self.cache = DynamicCache(config=self.config.text_config)
        elif shared < len(self._read):
            self.cache.crop(shared - len(self._read))
        self._read = []  # an interrupted `generate` may leave the cache half filled
        return has_items

    def note(self, ids: list[int]) -> None:
        """Note the tokens of a prompt and its answer. The cache holds the first of them."""
        self._read = ids[: self.cache.get_seq_length()]


def can_be_cut(cache: Cache) -> bool:
    """Whether tokens can be removed from its end. Sliding windows and states have lost the tokens before them."""
    return all(isinstance(layer, DynamicLayer) and type(layer).crop is DynamicLayer.crop for layer in cache.layers)
