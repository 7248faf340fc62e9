"""The encoder of pictures, packed for inference on CPUs: its weights are prepared once, and it reads bytes.

Pictures may stay uint8[B, H, W, C]: rescaling and normalising are part of the patch embedding's weights. Pictures are
resized by `resizing.py`. The blocks are those of `packed_blocks.py`, or compiled (`compiled_encoder.py`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from omni.blocks import Block
from omni.fast.jpeg import Pixels, ReadPixels, read_pixels
from omni.vision.image_processing_vision import OmniImageProcessor
from omni.vision.modeling_vision import OmniVisionModel
from omni.vision.pretrained import OmniVisionOutput

from .compiled_encoder import CompiledPictures, is_possible
from .packed_blocks import PackedBlock, is_plain, linear, weights_of
from .products import keep_memory
from .resizing import resize

CENTER = 128
"""Bytes are read as -128..127. All of these are exact in bfloat16, and rounding errors are small around zero."""


def pack(model: Any, processor: Any, dtype: torch.dtype) -> "PackedVisionModel | None":
    """The packed form of an encoder and its image processor; None if there is none.

    The encoder must be an `OmniVisionModel` on a CPU, just as its configuration describes it (without adapters, hooks,
    quantised or cut weights). The image processor must be an `OmniImageProcessor` that resizes pictures to the encoder's
    size, and does not crop or pad them.
    """
    if type(model) is not OmniVisionModel or type(processor) is not OmniImageProcessor or not is_plain(model):
        return None
    side, size = model.config.image_size, processor.size or {}
    square = processor.do_resize and (size.get("height"), size.get("width")) == (side, side)
    if not square or processor.do_center_crop or processor.do_pad or model.config.num_channels != 3:
        return None
    return PackedVisionModel(model, processor, dtype)


class PackedVisionModel:
    """An `OmniVisionModel` in eval mode, prepared for many calls. It copies the weights: later changes do not count.

    Args:
        model: the encoder, on a CPU.
        processor: the image processor.
        dtype: type of weights and activations, float32 or bfloat16.
        at_once: number of pictures that go through all layers together without compiled code. More do not fit into the
            processor's cache.

    Attributes:
        path: "compiled" for a function of machine code, else "packed".
    """

    def __init__(
        self,
        model: OmniVisionModel,
        processor: OmniImageProcessor,
        dtype: torch.dtype = torch.float32,
        *,
        at_once: int = 16,
    ) -> None:
        keep_memory()
        self.config, self.dtype, self.at_once = model.config, dtype, at_once
        self._resample = processor.resample
        size, patches = self.config.image_size, self.config.num_patches
        self.shapes = {
            "pixels": (self.config.num_channels, size, size),
            "bytes": (size, size, self.config.num_channels),
        }
        scale, shift = _scale_and_shift(processor, self.config.num_channels)
        kernel, bias = (parameter.detach() for parameter in model.embeddings.patch_embeddings.parameters())
        factor, offset = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(-1, 1, 1) for values in (scale, shift)
        )
        from_bytes = (kernel * factor).permute(0, 2, 3, 1)  # (D, P, P, C), the order of the bytes
        bias_of_bytes = bias + (kernel * (offset + CENTER * factor)).sum((1, 2, 3))
        pixels, raw = (kernel.flatten(1), bias), (from_bytes.flatten(1), bias_of_bytes)
        table = model.embeddings.position_embeddings.detach()
        cls = model.embeddings.cls_token.detach() + table[:, :1]
        layers: list[Block] = [*model.layers]
        self._compiled = None
        self.path = "compiled" if is_possible(self.config, dtype) else "packed"
        if self.path == "compiled":
            starts = [torch.cat([cls[0], table[0, 1:] + bias]).flatten() for _, bias in (pixels, raw)]
            self._compiled = CompiledPictures(
                self.config, dtype, [pixels[0], starts[0], raw[0], starts[1]], *weights_of(model.norm, layers)
            )
            return
        self.embed_pixels, self.embed_bytes = (linear(*each, dtype, at_once * patches) for each in (pixels, raw))
        self.cls, self.positions = cls.to(dtype), table[:, 1:].to(dtype, copy=True)
        self.blocks = [PackedBlock(layer, dtype, at_once * (1 + patches)) for layer in layers]
        self.norm = model.norm.weight.detach().to(torch.float32, copy=True)

    def read(self, source: Any, at_least: int | None = None) -> ReadPixels:
        """As `read_pixels`."""
        return read_pixels(source, at_least)

    def prepare(self, picture: Pixels) -> NDArray[np.uint8]:
        """One picture of any size -> uint8[H, W, 3]."""
        size = self.config.image_size
        return resize(picture, size, size, self._resample)

    def batch(self, prepared: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """uint8[B, H, W, 3]."""
        return torch.from_numpy(np.stack(prepared))

    def grid_shapes(self, pictures: torch.Tensor) -> list[tuple[int, ...]]:
        """Patches down and across of each picture."""
        return [(self.config.grid_size, self.config.grid_size)] * len(pictures)

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor, cls_only: bool = False) -> OmniVisionOutput:
        """Encode pictures.

        Args:
            pictures: uint8[B, H, W, C] as `prepare` makes them, or float[B, C, H, W] as the image processor does.
            cls_only: compute the CLS token alone; `grid` is None.

        Raises:
            ValueError: the pictures have another size, type, number of channels or device.
        """
        is_dense = pictures.is_cpu and pictures.layout is torch.strided
        if not is_dense or not (pictures.dtype == torch.uint8 or pictures.is_floating_point()):
            raise ValueError(
                f"Expected a dense tensor of bytes or of floating point numbers on the CPU, found {pictures.dtype} on "
                f"{pictures.device}, {pictures.layout}."
            )
        if tuple(pictures.shape[1:]) != (
            expected := self.shapes["bytes" if pictures.dtype == torch.uint8 else "pixels"]
        ):
            raise ValueError(
                f"Expected {pictures.dtype} pictures of shape {expected}, found {tuple(pictures.shape[1:])}."
            )
        encode = self._compiled or self._encode
        encoded = encode(pictures, cls_only).to(self.dtype)
        return OmniVisionOutput(
            last_hidden_state=encoded,
            pooler_output=encoded[:, 0],
            cls=encoded[:, :1],
            grid=None if cls_only else encoded[:, 1:],
        )

    def _encode(self, pictures: torch.Tensor, cls_only: bool) -> torch.Tensor:
        tokens = 1 if cls_only else 1 + self.config.num_patches
        encoded = torch.empty(len(pictures), tokens, self.config.hidden_size, dtype=torch.float32, device="cpu")
        for start in range(0, len(pictures), self.at_once):
            some = slice(start, start + self.at_once)
            hidden_states = self._embed(pictures[some])
            for block in self.blocks[:-1]:
                hidden_states = block(hidden_states)
            hidden_states = self.blocks[-1].cls(hidden_states) if cls_only else self.blocks[-1](hidden_states)
            encoded[some] = F.rms_norm(hidden_states.float(), self.norm.shape, self.norm, self.config.rms_norm_eps)
        return encoded

    def _embed(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8[B, H, W, C] or float[B, C, H, W] -> float[B, 1+N, D]."""
        side, patch, batch = self.config.grid_size, self.config.patch_size, len(pictures)
        if pictures.dtype == torch.uint8:
            pictures = torch.bitwise_xor(pictures, CENTER).view(torch.int8)  # the same as subtracting
            patches, embed = pictures.view(batch, side, patch, side, patch, -1).transpose(2, 3), self.embed_bytes
        else:
            split = pictures.reshape(batch, -1, side, patch, side, patch)
            patches, embed = split.permute(0, 2, 4, 1, 3, 5), self.embed_pixels
        rows = patches.contiguous().to(self.dtype).view(batch, side * side, -1)
        embedded = torch.empty(batch, 1 + side * side, self.config.hidden_size, dtype=self.dtype, device="cpu")
        embedded[:, :1] = self.cls
        torch.add(embed(rows), self.positions, out=embedded[:, 1:])
        return embedded


def _scale_and_shift(processor: OmniImageProcessor, channels: int) -> tuple[list[float], list[float]]:
    """For each channel, `scale` and `shift` in `pixel_values = pixel * scale + shift`, for pixels of 0..255."""
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return [rescale] * channels, [0.0] * channels
    mean, std = (np.broadcast_to(values, channels).tolist() for values in (processor.image_mean, processor.image_std))
    return [rescale / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
