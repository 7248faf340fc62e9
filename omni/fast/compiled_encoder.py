"""The encoders as functions of machine code, `compiled_encoder.cpp`."""

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from omni.blocks import BlockConfig
from omni.fast.compilation import address, compile_library, threads

KEPT = 32 * 2**20
"""Bytes of memory that a thread keeps for the next call. More, which a long sound may need, is given back."""

Matrices = Sequence[tuple[torch.Tensor, tuple[int, ...]]]
"""Tensors and the shapes that they must have."""


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("tokens", "width", "inner", "heads", "layers")),
        ("layer_epsilon", ctypes.c_float),
        ("rms_epsilon", ctypes.c_float),
    ]


class _Patches(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("side", "patch", "channels", "height")),
        *((name, ctypes.c_void_p) for name in ("pixels", "pixels_start", "bytes", "bytes_start")),
    ]


class _Convolutions(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("bands", "halvings")),
        *((name, ctypes.c_void_p) for name in ("start", "kernels")),
    ]


class _Sound(ctypes.Structure):
    _fields_ = [("features", ctypes.c_void_p), ("frames", ctypes.c_long)]


class _Compiled:
    """What the compiled functions have in common: the weights of the blocks in the layout that they read, and memory.

    Args:
        config: the encoder's configuration; see `is_possible`.
        dtype: the type that products read, float32 or bfloat16.
        shared: the tensors before those of the layers in `compiled_encoder.cpp`: matrices [O, K] and vectors, in float32.
        layers: the tensors of each layer.
        tokens: of an item.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        shared: list[torch.Tensor],
        layers: list[list[torch.Tensor]],
        tokens: int,
    ) -> None:
        self._shape = _Shape(
            tokens, config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_hidden_layers,
            config.layer_norm_eps, config.rms_norm_eps,
        )  # fmt: skip
        tensors = [tensor for some in (shared, *layers) for tensor in some]
        self._dtype, self._kept = dtype, threading.local()
        self._tensors = self._panels(list(zip(tensors, _shapes(config), strict=True)))
        self._weights = _addresses(self._tensors)

    def _panels(self, tensors: Matrices) -> list[torch.Tensor]:
        return [_panels(tensor, self._dtype, shape) for tensor, shape in tensors]

    def _function(self, name: str) -> Any:
        return getattr(_library(), f"{name}_{'bfloat16' if self._dtype == torch.bfloat16 else 'float32'}")

    def _room(self, needed: int) -> torch.Tensor:
        """So many bytes. They are kept, because new pages may take longer than the computation."""
        work: torch.Tensor | None = getattr(self._kept, "work", None)
        if work is None or len(work) < needed:
            work = torch.empty(needed, dtype=torch.uint8, device="cpu")
            if needed <= KEPT:
                self._kept.work = work
        return work


class CompiledPictures(_Compiled):
    """The encoder of pictures.

    Args:
        config, dtype, shared, layers: see `_Compiled`.
        stem: matrix and start of pixels, then of bytes: [D, values of a patch] and [(1+N) D].
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        stem: list[torch.Tensor],
        shared: list[torch.Tensor],
        layers: list[list[torch.Tensor]],
    ) -> None:
        super().__init__(config, dtype, shared, layers, 1 + config.num_patches)
        width, values = config.hidden_size, config.num_channels * config.patch_size**2
        shapes = [(width, values), (self._shape.tokens * width,)] * 2
        self._stem_tensors = self._panels(list(zip(stem, shapes, strict=True)))
        self._stem = _Patches(
            config.grid_size, config.patch_size, config.num_channels, config.image_size,
            *(tensor.data_ptr() for tensor in self._stem_tensors),
        )  # fmt: skip
        self._bytes_of_picture = self._call(None, False, 0, False, None, None, 1)

    def __call__(self, pictures: torch.Tensor, cls_only: bool) -> torch.Tensor:
        """uint8[B, H, W, C] or float[B, C, H, W] -> float32[B, 1+N, D], or float32[B, 1, D] for CLS alone.

        Raises:
            BufferError: the pictures have another shape or device.
        """
        stem, running, count = self._stem, threads(), len(pictures)
        raw, tokens = pictures.dtype == torch.uint8, 1 if cls_only else self._shape.tokens
        pictures = (pictures if raw else pictures.float()).contiguous()
        sides = (stem.height, stem.height)
        given = (
            address(pictures, torch.uint8, count, *sides, stem.channels)
            if raw
            else address(pictures, torch.float32, count, stem.channels, *sides)
        )
        encoded = torch.empty(count, tokens, self._shape.width, dtype=torch.float32, device="cpu")
        work = self._room(self._bytes_of_picture * running)
        room = address(work, torch.uint8, len(work))
        self._call(given, raw, count, cls_only, room, address(encoded, torch.float32, *encoded.shape), running)
        return encoded

    def _call(
        self,
        pictures: int | None,
        raw: bool,
        count: int,
        cls_only: bool,
        work: int | None,
        out: int | None,
        running: int,
    ) -> int:
        parts = ctypes.byref(self._shape), self._weights, ctypes.byref(self._stem)
        function = self._function("encode_pictures")
        return int(function(*parts, pictures, raw, count, cls_only, work, out, running))


class CompiledSounds(_Compiled):
    """The encoder of sounds.

    Args:
        config, dtype, shared, layers: see `_Compiled`.
        stem: matrix [D, 3 M] or [D, 3 D] and bias [D] of each convolution. In a row of a matrix, the weights of a frame
            follow each other.
    """

    def __init__(
        self,
        config: Any,
        dtype: torch.dtype,
        stem: list[tuple[torch.Tensor, torch.Tensor]],
        shared: list[torch.Tensor],
        layers: list[list[torch.Tensor]],
    ) -> None:
        super().__init__(config, dtype, shared, layers, 1)
        width = config.hidden_size
        depths = [3 * config.num_mel_bins, *[3 * width] * config.num_halvings]
        shapes = [shape for depth in depths for shape in ((width, depth), (width,))]
        tensors = [tensor for kernel in stem for tensor in kernel]
        self._stem_tensors = self._panels(list(zip(tensors, shapes, strict=True)))
        self._kernels = _addresses(self._stem_tensors)
        self._bands, self._reduction = config.num_mel_bins, config.time_reduction

    def __call__(self, sounds: Sequence[torch.Tensor], start: torch.Tensor, cls_only: bool) -> torch.Tensor:
        """Encode sounds of any lengths.

        Args:
            sounds: float32[F, M] of each, at least one frame.
            start: float32[n, D], CLS and positions, for the longest sound at least.
            cls_only: compute CLS alone.

        Returns:
            float32[I, n, D], zeros behind the tokens of a sound; or float32[I, 1, D] for CLS alone.

        Raises:
            BufferError: the sounds or `start` have another shape, type or device.
        """
        running, count, width = threads(), len(sounds), self._shape.width
        tokens = [1 + -(-len(sound) // self._reduction) for sound in sounds]
        given = (_Sound * count)(
            *(_Sound(address(sound, torch.float32, max(1, len(sound)), self._bands), len(sound)) for sound in sounds)
        )
        shape = _Shape.from_buffer_copy(self._shape)
        shape.tokens = max(tokens, default=1)
        stem = _Convolutions(
            self._bands,
            self._reduction.bit_length() - 1,
            address(start, torch.float32, max(len(start), shape.tokens), width),
            ctypes.cast(self._kernels, ctypes.c_void_p),
        )
        encoded = torch.zeros(count, 1 if cls_only else shape.tokens, width, dtype=torch.float32, device="cpu")
        parts = ctypes.byref(shape), self._weights, ctypes.byref(stem)
        function, apart = self._function("encode_sounds"), encoded.shape[1] * width
        needed = int(function(*parts, None, 0, cls_only, None, None, apart, running)) * running
        work = self._room(needed)
        room, out = address(work, torch.uint8, len(work)), address(encoded, torch.float32, *encoded.shape)
        function(*parts, given, count, cls_only, room, out, apart, running)
        return encoded


def _shapes(config: BlockConfig) -> list[tuple[int, ...]]:
    """Shapes of all tensors, in the order of `compiled_encoder.cpp`."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    shared = [(width,), (heads * width, width), (heads * width,), (width, heads * width), (width,)]
    layer = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (inner, width), (inner,), (width, inner), (width,),
    ]  # fmt: skip
    return [*shared, *layer * config.num_hidden_layers]  # type: ignore[attr-defined]


def is_possible(config: BlockConfig, dtype: torch.dtype) -> bool:
    """Whether there is a compiled function for blocks of this shape and this type.

    Widths must be multiples of a panel, and the activation the exact GELU.
    """
    if config.hidden_act != "gelu" or (library := _library()) is None:
        return False
    if dtype == torch.bfloat16 and not hasattr(library, "encode_pictures_bfloat16"):
        return False
    panel = library.encoder_panel()
    return all(width % panel == 0 for width in (config.hidden_size, config.head_dim, config.intermediate_size))


def _addresses(tensors: Sequence[torch.Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _panels(tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A matrix [O, K] as [O/PANEL, K, PANEL], in bfloat16 as [O/PANEL, K/2, PANEL, 2]. Zeros fill K up to whole panels.

    A vector stays as it is, in float32.

    Raises:
        BufferError: the tensor has another shape or device.
    """
    tensor = tensor.detach().float().contiguous()
    address(tensor, torch.float32, *shape)
    if tensor.ndim == 1:
        return tensor.clone(memory_format=torch.contiguous_format)
    library = _library()
    assert library is not None
    together = 2 if dtype == torch.bfloat16 else 1
    panel = library.encoder_panel()
    filled = F.pad(tensor, (0, -tensor.shape[1] % panel))
    return rearrange(filled.to(dtype), "(o p) (k t) -> o k p t", p=panel, t=together).contiguous()


@cache
def _library() -> ctypes.CDLL | None:
    names = [f"encode_{items}_{dtype}" for items in ("pictures", "sounds") for dtype in ("float32", "bfloat16")]
    library = compile_library(
        Path(__file__).with_name("compiled_encoder.cpp"),
        "encode_pictures_float32",
        "encode_sounds_float32",
        "encoder_panel",
    )
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    last = {"pictures": [pointer, number, count, number, pointer, pointer, number]}
    last["sounds"] = [pointer, count, number, pointer, pointer, count, number]
    for name in names:
        if function := getattr(library, name, None):
            function.argtypes = [pointer, pointer, pointer, *last[name.split("_")[1]]]
            function.restype = ctypes.c_size_t
    return library
