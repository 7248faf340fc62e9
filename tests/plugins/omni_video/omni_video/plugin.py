"""Short videos as a modality of omni, through VideoMAE of transformers, whose forward reads `pixel_values` as pictures' do.

Shapes: I videos, T frames, H x W pixels, N tokens, D width.

    videos uint8[t, h, w, 3] ─preprocessor─▶ video_values float[I, T, 3, H, W] ─encoder─▶ grid (I, N, D)

A token is of 2 frames and 8 x 8 pixels, so the grid has three axes. There is no CLS.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from PIL import Image
from transformers import BatchFeature, VideoMAEConfig, VideoMAEModel

from omni import Modality
from omni.modality import ItemError


class MissingVideoError(ItemError):
    """No such file."""

    kind = "missing"


@strict
class VideoConfig(VideoMAEConfig):
    """VideoMAE for 4 frames of 16 x 16 pixels."""

    model_type = "toy_video"

    image_size: int = 16
    patch_size: int = 8
    num_frames: int = 4
    tubelet_size: int = 2
    hidden_size: int = 16
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    intermediate_size: int = 32


class VideoEncoder(VideoMAEModel):
    """VideoMAE under a configuration of its own, in any precision."""

    config_class = VideoConfig

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(pixel_values.to(self.dtype), **kwargs)


class VideoPreprocessor:
    """Videos of any size and length -> frames that lie evenly in them, scaled."""

    model_input_names = ["pixel_values"]

    def __init__(self, num_frames: int = 4, side: int = 16) -> None:
        self.num_frames, self.side = num_frames, side

    def __call__(self, videos: Sequence[Any], return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        return BatchFeature({"pixel_values": np.stack([*map(self._scaled, videos)])}, tensor_type=return_tensors)

    def _scaled(self, video: Any) -> np.ndarray:
        frames = np.asarray(video)[np.linspace(0, len(video) - 1, self.num_frames).round().astype(int)]
        scaled = [np.asarray(Image.fromarray(frame).resize((self.side, self.side))) for frame in frames]
        return (np.stack(scaled).transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        return {"num_frames": self.num_frames, "side": self.side}


def grid_shapes(config: VideoConfig, inputs: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Tokens along time, down and across."""
    return [
        (len(video) // config.tubelet_size, *(side // config.patch_size for side in video.shape[-2:]))
        for video in inputs["video_values"]
    ]


def read(encoded: Any, num_patches: int) -> dict[str, Any]:
    """All of its tokens are of places."""
    return {"grid": encoded.last_hidden_state}


def open_video(source: Any) -> np.ndarray:
    """A video from a file of NumPy, uint8[t, h, w, 3].

    Raises:
        ItemError: no such file, or another one.
    """
    if not isinstance(source, str | PathLike | bytes | np.ndarray):
        raise TypeError(f"open_video takes a path, bytes or an array, not {type(source).__name__}")
    name = "The video" if isinstance(source, bytes | np.ndarray) else repr(str(source))
    try:
        data = source if isinstance(source, bytes | np.ndarray) else Path(source).read_bytes()
        video = data if isinstance(data, np.ndarray) else np.load(BytesIO(data))
    except FileNotFoundError as error:
        raise MissingVideoError(f"{name} does not exist, expected a video; check the path.") from error
    except (OSError, ValueError, EOFError) as error:
        raise ItemError(f"{name} is no video, expected a file of NumPy; check that it is the right file.") from error
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not video.size:
        raise ItemError(f"{name} is {video.dtype} of shape {video.shape}, expected uint8[t, h, w, 3]; save it so.")
    return video


def stand_ins(video: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Grey, and noise, of the same size."""
    noise = np.random.default_rng(seed).integers(0, 256, video.shape, dtype=np.uint8)
    return {"blank": np.full_like(video, 128), "noise": noise}


def probes(config: VideoConfig, preprocessor: VideoPreprocessor) -> list[np.ndarray]:
    """Noise of several lengths and sizes."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((4, 16, 16), (9, 20, 32), (1, 40, 24))]


video = Modality(
    name="video",
    token="<video>",
    inputs={"video_values": "pixel_values"},
    config_class=VideoConfig,
    model_class=VideoEncoder,
    preprocessor_class=VideoPreprocessor,
    grid_shapes=grid_shapes,
    grid_dims=3,
    outputs=("grid",),
    read=read,
    open=open_video,
    suffixes=(".npy",),
    media_types=("video/x-npy",),
    noun="video",
    show=lambda video: Image.fromarray(video[0]),
    stand_ins=stand_ins,
    probes=probes,
)
