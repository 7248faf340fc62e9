"""The encoder of pictures, packed for inference on CPUs: its weights are prepared once, and it reads bytes.

It differs from `OmniVisionModel` in these ways, which make it faster:

* Pictures may stay uint8[B, H, W, C]: rescaling and normalising are part of the patch embedding's weights. Pictures
  are resized by `resizing.py`.
* For CLS alone, the last block computes one row. Its query is multiplied with the keys' weights, since q (W_k h) equals
  (q W_k) h, and the weighted sum is taken before the values' weights. So neither keys nor values are computed.
* With a C++ compiler, everything is one function of machine code (`compiled_encoder.py`). Each thread takes a picture
  through all layers within its own caches. It uses the processor's matrix units, if there are any.
* Without one, weights are stored in the layout of oneDNN's kernels. GELU and the residual sum are part of the product before
  them. In bfloat16, attention is two batched products, with one pass of powers of two between them (`_attend`).

In float32 the result differs from the model's by rounding alone.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from torch import nn
from transformers.activations import ACT2FN

from omni.blocks import Block
from omni.fast.jpeg import Pixels, ReadPixels, read_pixels
from omni.vision.image_processing_vision import OmniImageProcessor
from omni.vision.modeling_vision import OmniVisionModel
from omni.vision.pretrained import OmniVisionOutput

from .compiled_encoder import CompiledEncoder, is_possible
from .resizing import resize

CENTER = 128
"""Bytes are read as -128..127. All of these are exact in bfloat16, and rounding errors are small around zero."""

SAFE = 2.0**100
"""Bound on the sum of a row of powers of two. A bfloat16 reaches 2^127, and keeps all its digits down to 2^-126."""

FUSED = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""Activations that oneDNN computes with a product: transformers' name and oneDNN's."""


def pack(model: Any, processor: Any, dtype: torch.dtype) -> "PackedVisionModel | None":
    """The packed form of an encoder and its image processor; None if there is none.

    The encoder must be an `OmniVisionModel` on a CPU, just as its configuration describes it (without adapters, hooks,
    quantised or cut weights). The image processor must be an `OmniImageProcessor` that resizes pictures to the encoder's
    size, and does not crop or pad them.
    """
    if type(model) is not OmniVisionModel or type(processor) is not OmniImageProcessor or not _is_plain(model):
        return None
    side, size = model.config.image_size, processor.size or {}
    square = processor.do_resize and (size.get("height"), size.get("width")) == (side, side)
    if not square or processor.do_center_crop or processor.do_pad or model.config.num_channels != 3:
        return None
    return PackedVisionModel(model, processor, dtype)


def _is_plain(model: OmniVisionModel) -> bool:
    with torch.device("meta"):
        expected = OmniVisionModel(copy.deepcopy(model.config))
    if [*map(type, model.modules())] != [*map(type, expected.modules())]:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    return all(
        parameter.shape == other.shape and parameter.is_cpu
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True)
    )


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
        _keep_memory()
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
            _, to_scores, from_values = _attention_weights(layers[-1], math.log2(math.e))
            before = [pixels[0], starts[0], raw[0], starts[1], model.norm.weight, *to_scores, *from_values]
            within = [_parameters(layer) for layer in layers]
            self._compiled = CompiledEncoder(self.config, dtype, before, within)
            return
        self.embed_pixels, self.embed_bytes = (_linear(*each, dtype, at_once * patches) for each in (pixels, raw))
        self.cls, self.positions = cls.to(dtype), table[:, 1:].to(dtype, copy=True)
        self.blocks = [_PackedBlock(layer, dtype, at_once * (1 + patches)) for layer in layers]
        self.norm = model.norm.weight.detach().to(torch.float32, copy=True)

    def read(self, source: Any, at_least: int | None = None) -> ReadPixels:
        """As `read_pixels`."""
        return read_pixels(source, at_least)

    def prepare(self, picture: Pixels) -> NDArray[np.uint8]:
        """One picture of any size -> uint8[H, W, 3]."""
        size = self.config.image_size
        return resize(picture, size, size, self._resample)

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


class _PackedBlock:
    """As `Block`: float[B, 1+N, D] -> float[B, 1+N, D], or the CLS row alone."""

    def __init__(self, layer: Block, dtype: torch.dtype, rows: int) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.dtype, self.heads = dtype, attention.num_attention_heads
        self.norm1, self.norm2 = _layer_norm(layer.norm1, dtype), _layer_norm(layer.norm2, dtype)
        qkv, _, _ = _attention_weights(layer, math.log2(math.e) if dtype == torch.bfloat16 else 1.0)
        _, to_scores, from_values = _attention_weights(layer, 1.0)
        self.qkv, self.to_scores, self.from_values = (_linear(*w, dtype, rows) for w in (qkv, to_scores, from_values))
        self.output = _linear(attention.o_proj.weight, attention.o_proj.bias, dtype, rows)
        self.fc1 = _linear(mlp.fc1.weight, mlp.fc1.bias, dtype, rows, attention.config.hidden_act)
        self.fc2 = _linear(mlp.fc2.weight, mlp.fc2.bias, dtype, rows)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float[B, n, D] -> float[B, n, D]."""
        qkv = self.qkv(self.norm1(hidden_states))
        if self.dtype == torch.bfloat16:
            attended = _attend(qkv, self.heads)
        else:
            query, key, value = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
            attended = F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)
        return self._mlp(self.output(attended, hidden_states))

    def cls(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float[B, n, D] -> float[B, 1, D]."""
        normed = self.norm1(hidden_states)
        query = self.to_scores(normed[:, 0].contiguous()).view(len(normed), self.heads, -1)  # (B, h, D)
        attended = (query @ normed.transpose(1, 2)).softmax(-1) @ normed
        return self._mlp(self.from_values(attended.flatten(1), hidden_states[:, 0].contiguous())[:, None])

    def _mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.norm2(hidden_states)), hidden_states)


def _scale_and_shift(processor: OmniImageProcessor, channels: int) -> tuple[list[float], list[float]]:
    """For each channel, `scale` and `shift` in `pixel_values = pixel * scale + shift`, for pixels of 0..255."""
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return [rescale] * channels, [0.0] * channels
    mean, std = (np.broadcast_to(values, channels).tolist() for values in (processor.image_mean, processor.image_std))
    return [rescale / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


Affine = tuple[torch.Tensor, torch.Tensor]
"""Weight [O, I] and bias [O] of a linear layer."""


def _attention_weights(layer: Block, factor: float) -> tuple[Affine, Affine, Affine]:
    """The weights of a block's attention. Scores are multiplied by `factor`, such as log2(e) for 2^(x log2(e)) = e^x.

    Returns:
        qkv, with the scaling in the queries' weights. Then, for CLS alone and for each head: queries and keys as one matrix
        (without the keys' bias, which adds the same to every score), and values and output as another.
    """
    attention = layer.attention
    width, heads = attention.o_proj.in_features, attention.num_attention_heads
    weight, bias = attention.qkv.weight.detach().clone(), attention.qkv.bias.detach().clone()
    weight[:width] *= attention.scaling * factor
    bias[:width] *= attention.scaling * factor
    output, output_bias = attention.o_proj.weight.detach(), attention.o_proj.bias.detach()
    query, key, value = rearrange(weight, "(k h d) i -> k h d i", k=3, h=heads)
    query_bias = rearrange(bias[:width], "(h d) -> h d", h=heads)
    to_scores = torch.einsum("hdi,hdj->hji", query, key).flatten(0, 1), torch.einsum("hd,hdj->hj", query_bias, key)
    from_values = torch.einsum("ohd,hdi->ohi", output.view(width, heads, -1), value).flatten(1)
    return (
        (weight, bias),
        (to_scores[0], to_scores[1].flatten()),
        (from_values, output_bias + output @ bias[2 * width :]),
    )


def _parameters(layer: Block) -> list[torch.Tensor]:
    """The parameters of a block, in the order of `compiled_encoder.cpp`."""
    attention, mlp = layer.attention, layer.mlp
    qkv, _, _ = _attention_weights(layer, math.log2(math.e))
    return [
        layer.norm1.weight, layer.norm1.bias, *qkv, attention.o_proj.weight, attention.o_proj.bias,
        layer.norm2.weight, layer.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
    ]  # fmt: skip


def _attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """bfloat16[B, n, 3 D] -> bfloat16[B, n, D]: softmax(q k^T) v, for queries that hold a factor of log2(e).

    The usual softmax first finds each row's largest score. This one does not. It divides by the row's sum after the second
    product, whose rows are shorter. A row's sum is at least its largest power, and at most n times that. So if the sums are
    within `SAFE`, nothing has overflowed, and what has underflowed is negligible. Otherwise the usual softmax is used.
    """
    batch = len(qkv)
    query, key, value = rearrange(qkv, "b n (k h d) -> k (b h) n d", k=3, h=heads)
    powers = torch.bmm(query, key.transpose(1, 2)).exp2_()
    sums = powers.sum(-1, keepdim=True, dtype=torch.float32)
    least, most = sums.aminmax()
    if least > 1 / SAFE and most < SAFE:  # false for NaN
        attended = torch.bmm(powers, value).div_(sums)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)).float() * math.log(2)
        attended = torch.bmm(scores.softmax(-1).to(value.dtype), value)
    return rearrange(attended, "(b h) n d -> b n (h d)", b=batch)


def _keep_memory() -> None:
    """Free a block of 31 MiB. glibc then keeps freed memory up to twice that size.

    Otherwise every layer takes new pages from the system, which fills them with zeros, and returns them: about an eighth of
    the time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def _layer_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = norm.weight.detach().to(dtype, copy=True), norm.bias.detach().to(dtype, copy=True)
    return lambda hidden_states: F.layer_norm(hidden_states, weight.shape, weight, bias, norm.eps)


def _linear(
    weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, rows: int, activation: str | None = None
) -> Callable[..., torch.Tensor]:
    """`f(x)` = activation(x W^T + b) and `f(x, residual)` = x W^T + b + residual, on a private copy of the weights.

    With oneDNN this is one kernel, in a layout for this number of `rows`; otherwise it is PyTorch's.
    """
    weight, bias = (tensor.detach().to(dtype, copy=True).contiguous() for tensor in (weight, bias))
    if not (_has_onednn(dtype) and activation in (None, *FUSED)):
        activate = ACT2FN[activation] if activation else nn.Identity()

        def plain(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            result = activate(F.linear(x, weight, bias))
            return result if residual is None else result + residual

        return plain
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    name, algorithm = FUSED[activation] if activation else ("none", "")

    def fused(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, reordered, bias, name, [], algorithm)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, reordered, bias, "add")

    return fused


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN is available and enabled, and takes weights of this type on this processor."""
    known = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    wanted = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    return bool(known and wanted)
