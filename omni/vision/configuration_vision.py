"""Configuration of the vision encoder.

The defaults are the seed's ViT-Tiny: 224 px, patches of 16 px, width 128, 4 blocks, 2 heads, MLP width 512.
Numbers that follow from these (`grid_size`, `num_patches`, `head_dim`) are properties, so that they cannot disagree.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from omni.checkpoints.configuration import StrictConfig


@strict
class OmniVisionConfig(StrictConfig):
    """Configuration of `OmniVisionModel`. It takes Hugging Face's names and the seed's (in brackets).

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
        fingerprints: hash of the saved weights.

    Raises:
        ValueError: a size does not divide another, a key is unknown, or the two names of a number have different values.
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type.
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
    sizes = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "intermediate_size")
    multiples = (("image_size", "patch_size"), ("hidden_size", "num_attention_heads"))

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
