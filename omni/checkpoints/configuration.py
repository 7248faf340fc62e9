"""A configuration that refuses unknown keys: the base of the encoders' configurations.

A number may have two names (`attribute_map`): a field with Hugging Face's name, such as `hidden_size`, and another name for
it, such as `d_model`.
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
        """Refuse two values for one number. Later, given values cannot be told from defaults."""
        for alias, name in cls.attribute_map.items():
            if alias in kwargs and kwargs.get(name, kwargs[alias]) != kwargs[alias]:
                raise ValueError(
                    f"`{alias}` is another name of `{name}`, but they were given as {kwargs[alias]!r} and "
                    f"{kwargs[name]!r}; give one of them."
                )
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        # the base class applies the other names after this method, too late for the checks here
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        if unknown := sorted(set(kwargs) - INHERITED_KEYS):
            inherited_fields = {field.name for field in fields(PreTrainedConfig)}
            known = sorted({field.name for field in fields(self)} - inherited_fields | {*self.attribute_map})
            raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} for {type(self).__name__}; known: {known}.")
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here, since `@strict` would turn the ValueError into another error

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing; see `StrictLoadingMixin.register_for_auto_class`."""

    def validate_architecture(self) -> None:
        """Check that sizes fit each other. `@strict` calls this again before saving.

        Raises:
            ValueError: a size is below 1, or does not divide another as it should.
        """
        for name in self.sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, found {getattr(self, name)}.")
        for whole, part in self.multiples:
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"`{whole}` must be a multiple of `{part}`, found {getattr(self, whole)} and {getattr(self, part)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the declared settings alone. Any other attribute would be refused when the file is read."""
        known = {*(field.name for field in fields(self)), *INHERITED_KEYS}
        return {key: value for key, value in super().to_dict().items() if key in known}
