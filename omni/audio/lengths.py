"""The number of tokens that an audio encoder, omni's or one of transformers, makes of a sound."""

from typing import Any

WHISPER, SPECTROGRAM = "whisper", "audio-spectrogram-transformer"


def hears_samples(config: Any) -> bool:
    """Whether an encoder reads samples, like wav2vec 2.0 (wav2vec2, hubert, wavlm, ...), and not a spectrogram."""
    return hasattr(config, "conv_kernel") and hasattr(config, "conv_stride") and hasattr(config, "feat_extract_norm")


def num_tokens(config: Any, frames: Any) -> Any:
    """The number of tokens of `grid`.

    Args:
        config: the encoder's configuration.
        frames: the number of frames of features, or of samples if the encoder reads samples: int, or int[I] of NumPy or
            PyTorch. The result has the same form.

    Raises:
        ValueError: this type of encoder is unknown.
    """
    if config.model_type == WHISPER:
        return (frames + 1) // 2
    if config.model_type == SPECTROGRAM:  # its spectrogram has a fixed size
        down = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
        across = (config.max_length - config.patch_size) // config.time_stride + 1
        return down * across + 0 * frames
    if hears_samples(config):
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            frames = (frames - kernel) // stride + 1
        for _ in range(config.num_adapter_layers if getattr(config, "add_adapter", False) else 0):
            frames = (frames - 1) // config.adapter_stride + 1
        return frames
    if hasattr(config, "time_reduction"):
        return -(-frames // config.time_reduction)
    raise ValueError(
        f"An encoder of type {config.model_type!r} cannot be an audio tower; expected omni_audio, {WHISPER}, {SPECTROGRAM}, "
        "or one like wav2vec2."
    )
