"""How many tokens an audio encoder makes of a sound, omni's or one of transformers."""

from typing import Any

WHISPER, SPECTROGRAM = "whisper", "audio-spectrogram-transformer"


def hears_samples(config: Any) -> bool:
    """Whether an encoder is of wav2vec 2.0's kind (wav2vec2, hubert, wavlm, ...): convolutions over samples."""
    return hasattr(config, "conv_kernel") and hasattr(config, "conv_stride") and hasattr(config, "feat_extract_norm")


def num_tokens(config: Any, frames: Any) -> Any:
    """Tokens of `grid` for this many frames of features, or samples if the encoder reads those.

    Args:
        config: of the encoder.
        frames: int, or int[I] of NumPy or PyTorch.

    Raises:
        ValueError: an encoder of which this is not known.
    """
    if config.model_type == WHISPER:
        return (frames + 1) // 2
    if config.model_type == SPECTROGRAM:  # its spectrogram has a fixed size, as a picture has
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
        f"An encoder of type {config.model_type!r} cannot hear for omni; expected omni_audio, {WHISPER}, {SPECTROGRAM}, or "
        "one of wav2vec2's kind."
    )
