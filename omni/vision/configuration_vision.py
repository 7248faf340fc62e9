"""Configuration of the vision encoder.

The defaults are the seed's ViT-Tiny: 224 px, patches of 16 px, width 128, 4 blocks, 2 heads, MLP width 512.
Whatever follows from other numbers (`grid_size`, `num_patches`, `head_dim`) is a property, so that it cannot disagree.
"""

from dataclasses import fields
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from omni.checkpoints.strict import INHERITED_KEYS


@strict
class OmniVisionConfig(PreTrainedConfig):
    """Configuration of `OmniVisionModel`; takes Hugging Face's names and the seed's (in brackets).

    Args:
        image_size [`img_size`]: height and width of a picture in pixels.
        patch_size [`patch`]: height and width of a patch in pixels; divides `image_size`.
        num_channels: colour channels of a picture.
        hidden_size [`d_model`]: width D of every token.
        num_hidden_layers [`n_layers`]: number of blocks.
        num_attention_heads [`n_heads`]: heads of the self-attention; divides `hidden_size`.
        intermediate_size [`d_ff`]: width of the MLP inside a block.
        hidden_act: activation of the MLP; "gelu" is the exact (erf) one.
        hidden_dropout_prob [`dropout`]: one probability for the attention weights, the inside of the MLP and both
            residual branches, as in `nn.TransformerEncoderLayer`.
        layer_norm_eps: epsilon of the LayerNorms in the blocks.
        rms_norm_eps: epsilon of the final RMSNorm.
        initializer_range: standard deviation of the initial weights of linear and convolution layers.
        fingerprints: hash of the weights as they were saved.

    Raises:
        ValueError: a size that does not divide, a key that does not exist, or the same number given under both of its
            names with different values.
        huggingface_hub.errors.StrictDataclassError: a value of the wrong type.
    """

    model_type = "omni_vision"
    base_config_key = "vision_config"
    attribute_map: ClassVar[dict[str, str]] = {
        "img_size": "image_size",
        "patch": "patch_size",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "dropout": "hidden_dropout_prob",
    }

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    intermediate_size: int = 512
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    fingerprints: dict[str, str] | None = None

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
        sizes = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, found {getattr(self, name)}.")
        for whole, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, part) < 1 or getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"`{whole}` must be a multiple of `{part}`, found {getattr(self, whole)} and {getattr(self, part)}."
                )

    def to_dict(self) -> dict[str, Any]:
        """As JSON: the declared settings alone. What else somebody hung on this object would be refused when read again."""
        known = {*(field.name for field in fields(self)), *INHERITED_KEYS}
        return {key: value for key, value in super().to_dict().items() if key in known}

    @property
    def grid_size(self) -> int:
        """Patches along one side: 14 for 224 px and patches of 16 px."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the tokens of `grid`: 196 for 14 x 14."""
        return self.grid_size**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def _generation_keys() -> list[str]:
    """Settings of `generate` that old config files carry; transformers drops them."""
    from transformers import GenerationConfig

    return list(GenerationConfig._get_default_generation_params())
