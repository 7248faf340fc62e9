"""A configuration that refuses what it does not know: the base of the encoders' configurations.

A number may have two names (`attribute_map`): Hugging Face's, which is a field, and another, as `d_model` for `hidden_size`.
"""

from dataclasses import fields
from typing import Any, ClassVar, Self

from transformers.configuration_utils import PreTrainedConfig

from omni.checkpoints.strict import INHERITED_KEYS


class StrictConfig(PreTrainedConfig):
    """Declares its fields, under `@strict`; every other key is refused.

    Attributes:
        sizes: fields that must be at least 1.
        multiples: pairs of fields, of which the first must be a multiple of the second.

    Raises:
        ValueError: a key that does not exist, a size that does not fit, or the same number given under both of its names
            with different values.
        huggingface_hub.errors.StrictDataclassError: a value of the wrong type.
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    multiples: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse one number under two names; after this, given values cannot be told from defaults."""
        for alias, name in cls.attribute_map.items():
            if alias in kwargs and kwargs.get(name, kwargs[alias]) != kwargs[alias]:
                raise ValueError(
                    f"`{alias}` is another name of `{name}`, but they were given as {kwargs[alias]!r} and "
                    f"{kwargs[name]!r}; give one of them."
                )
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        # The base class applies aliases only after this method, too late for whatever is derived here.
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        inherited = INHERITED_KEYS | set(_generation_keys())
        if unknown := sorted(set(kwargs) - inherited):
            inherited_fields = {field.name for field in fields(PreTrainedConfig)}
            known = sorted({field.name for field in fields(self)} - inherited_fields | {*self.attribute_map})
            raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} for {type(self).__name__}; known: {known}.")
        super().__post_init__(**kwargs)
        self.validate_architecture()  # `@strict` would wrap the ValueError into an error that is none

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing, as for the models: see `StrictLoadingMixin`."""

    def validate_architecture(self) -> None:
        """Sizes that fit each other; `@strict` calls this again before saving."""
        for name in self.sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, found {getattr(self, name)}.")
        for whole, part in self.multiples:
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"`{whole}` must be a multiple of `{part}`, found {getattr(self, whole)} and {getattr(self, part)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the declared settings alone. What else somebody hung on this object would be refused when read again."""
        known = {*(field.name for field in fields(self)), *INHERITED_KEYS}
        return {key: value for key, value in super().to_dict().items() if key in known}


def _generation_keys() -> list[str]:
    """Settings of `generate` that old config files carry; transformers drops them."""
    from transformers import GenerationConfig

    return list(GenerationConfig._get_default_generation_params())
