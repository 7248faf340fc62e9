"""Configuration of the audio encoder.

The defaults are for 16 kHz: 80 mel bands, one token for 8 frames (80 ms), width 192, 4 blocks, 3 heads.
With the stem "conv2d", RMSNorm in the blocks, no positions and no CLS token it is exactly micro-Omni's audio encoder.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from omni.checkpoints.configuration import StrictConfig

CHOICES = {
    "stem": ("conv1d", "conv2d"),
    "position_embedding": ("sinusoidal", "none"),
    "block_norm": ("layer_norm", "rms_norm"),
}


@strict
class OmniAudioConfig(StrictConfig):
    """Configuration of `OmniAudioModel`. It takes Hugging Face's names and micro-Omni's (in brackets).

    Args:
        num_mel_bins [`mel_bins`]: mel bands M of a frame.
        time_reduction [`downsample_time`]: frames that become one token; a power of 2, at least 2.
        stem: "conv1d" for convolutions over time, or "conv2d" for convolutions over time and frequency, as in micro-Omni.
        stem_channels: channels of the stem "conv2d".
        position_embedding: "sinusoidal" or "none".
        block_norm: "layer_norm" or "rms_norm", in the blocks.
        cls_token: whether a learned CLS token comes before the others; without it, `cls` is the mean of `grid`.
        hidden_size [`d_model`]: width D of every token.
        num_hidden_layers [`n_layers`]: number of blocks.
        num_attention_heads [`n_heads`]: heads of the self-attention; divides `hidden_size`.
        intermediate_size [`d_ff`]: width of the MLP inside a block.
        hidden_act: activation of the MLP; "gelu" is the exact (erf) one.
        hidden_dropout_prob [`dropout`]: one probability for the attention weights, the inside of the MLP and both
            residual branches.
        layer_norm_eps: epsilon of the norms in the blocks.
        rms_norm_eps: epsilon of the final RMSNorm.
        initializer_range: standard deviation of the initial weights of linear layers; convolutions use He initialization.
        fingerprints: hash of the saved weights.

    Raises:
        ValueError: a size does not divide another, a key or a choice is unknown, or the two names of a number have different
            values.
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type.
    """

    model_type = "omni_audio"
    base_config_key = "audio_config"
    attribute_map: ClassVar[dict[str, str]] = {
        "mel_bins": "num_mel_bins",
        "downsample_time": "time_reduction",
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "d_ff": "intermediate_size",
        "dropout": "hidden_dropout_prob",
    }
    sizes = ("num_mel_bins", "stem_channels", "hidden_size", "num_hidden_layers", "intermediate_size")
    multiples = (("hidden_size", "num_attention_heads"),)

    num_mel_bins: int = 80
    time_reduction: int = 8
    stem: str = "conv1d"
    stem_channels: int = 64
    position_embedding: str = "sinusoidal"
    block_norm: str = "layer_norm"
    cls_token: bool = True
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    intermediate_size: int = 768
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    fingerprints: dict[str, str] | None = None

    def validate_architecture(self) -> None:
        """Refuse sizes that do not fit each other, and unknown choices."""
        super().validate_architecture()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, found {getattr(self, name)!r}.")
        if self.time_reduction < 2 or self.time_reduction & (self.time_reduction - 1):
            raise ValueError(f"`time_reduction` must be 2, 4, 8 or another power of 2, found {self.time_reduction}.")
        if self.position_embedding == "sinusoidal" and (self.hidden_size % 2 or self.hidden_size < 4):
            raise ValueError(
                f"Sinusoidal positions need an even `hidden_size` of at least 4, found {self.hidden_size}; choose another "
                "one, or `position_embedding='none'`."
            )

    @property
    def num_halvings(self) -> int:
        """Convolutions that halve the frames: 3 for a `time_reduction` of 8."""
        return self.time_reduction.bit_length() - 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads
