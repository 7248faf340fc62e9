"""Short one-dimensional signals of any length as a modality of omni.

Shapes: I signals, S samples in the longest, F frames of `hop` samples, D width.

    signals ─preprocessor─▶ signal_values float[I, S], signal_lengths int64[I] ─encoder─▶ cls (I, 1, D), grid (I, F, D)

A signal shorter than its neighbours is padded, and the padding is masked, so that its tokens depend on itself alone.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import ModelOutput

from omni import Modality
from omni.modality import ItemError, MissingItemError


@strict
class SignalConfig(PreTrainedConfig):
    """Frames of `hop` samples, tokens of width `hidden_size`."""

    model_type = "toy_signal"

    hop: int = 4
    hidden_size: int = 16
    num_attention_heads: int = 2
    initializer_range: float = 0.02


@dataclass
class SignalOutput(ModelOutput):
    """cls float[I, 1, D] and grid float[I, F, D]."""

    cls: torch.Tensor | None = None
    grid: torch.Tensor | None = None


class SignalEncoder(PreTrainedModel):
    """Frames, one self-attention over the real ones, and their mean as CLS."""

    config_class = SignalConfig
    main_input_name = "signal_values"

    def __init__(self, config: SignalConfig) -> None:
        super().__init__(config)
        self.frames = nn.Conv1d(1, config.hidden_size, kernel_size=config.hop, stride=config.hop)
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, signal_values: torch.Tensor, signal_lengths: torch.Tensor, **kwargs: Any) -> SignalOutput:
        frames = self.frames(signal_values[:, None].to(self.dtype)).transpose(1, 2)  # (I, F, D)
        real = torch.arange(frames.shape[1], device=frames.device) < (signal_lengths // self.config.hop)[:, None]
        mixed, _ = self.attention(frames, frames, frames, key_padding_mask=~real, need_weights=False)
        grid = self.norm(frames + mixed) * real[..., None]
        return SignalOutput(cls=(grid.sum(1) / real.sum(1, keepdim=True)).to(grid.dtype)[:, None], grid=grid)


class SignalPreprocessor:
    """Arrays of any length -> one padded batch and the lengths, rounded up to whole frames."""

    model_input_names = ["signal_values", "signal_lengths"]

    def __init__(self, hop: int = 4, gain: float = 1.0) -> None:
        self.hop, self.gain = hop, gain

    def __call__(self, items: Sequence[Any], return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        arrays = [np.asarray(item, dtype=np.float32) * kwargs.get("gain", self.gain) for item in items]
        lengths = [-(-len(array) // self.hop) * self.hop for array in arrays]
        values = np.stack([np.pad(array, (0, max(lengths) - len(array))) for array in arrays])
        return BatchFeature({"signal_values": values, "signal_lengths": np.array(lengths)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return {"hop": self.hop, "gain": self.gain}


def grid_shapes(config: SignalConfig, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Whole frames of each signal."""
    return [(int(length) // config.hop,) for length in inputs["signal_lengths"]]


def read_signal(source: Any) -> np.ndarray:
    """A signal from the bytes or the path of a .npy file; one that is open stays as it is."""
    if isinstance(source, np.ndarray):
        return source
    if not isinstance(source, str | PathLike | bytes):
        raise TypeError(f"read_signal takes a path, bytes or an array, not {type(source).__name__}")
    try:
        return np.load(io.BytesIO(source) if isinstance(source, bytes) else source).astype(np.float32)
    except FileNotFoundError as error:
        raise MissingItemError(f"{source!r} does not exist, expected a signal; check the path.") from error
    except (OSError, ValueError, EOFError) as error:
        raise ItemError(f"{source!r} is no signal ({error}); expected a .npy file.") from error


def probes(config: SignalConfig, preprocessor: SignalPreprocessor) -> list[np.ndarray]:
    """Noise of several lengths."""
    random = np.random.default_rng(0)
    return [random.normal(size=length).astype(np.float32) for length in (24, 64, 39, 8)]


signal = Modality(
    name="signal",
    token="<signal>",
    inputs=("signal_values", "signal_lengths"),
    config_class=SignalConfig,
    model_class=SignalEncoder,
    preprocessor_class=SignalPreprocessor,
    grid_shapes=grid_shapes,
    open=read_signal,
    suffixes=(".npy",),
    noun="signal",
    probes=probes,
)
