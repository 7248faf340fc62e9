"""The encoder as one function of machine code, `compiled_encoder.cpp`."""

import ctypes
import threading
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange

from omni.fast.compilation import address, compile_library, threads
from omni.vision.configuration_vision import OmniVisionConfig


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("tokens", "width", "inner", "heads", "layers")),
        *((name, ctypes.c_long) for name in ("side", "patch", "channels", "height")),
        ("layer_epsilon", ctypes.c_float),
        ("rms_epsilon", ctypes.c_float),
    ]


class CompiledEncoder:
    """The compiled function, with an encoder's weights in the layout that it reads.

    Args:
        config: the encoder's configuration; see `is_possible`.
        dtype: the type that products read, float32 or bfloat16.
        shared: the tensors before those of the layers in `compiled_encoder.cpp`: matrices [O, K] and vectors, in float32.
        layers: the tensors of each layer.
    """

    def __init__(
        self,
        config: OmniVisionConfig,
        dtype: torch.dtype,
        shared: list[torch.Tensor],
        layers: list[list[torch.Tensor]],
    ) -> None:
        self._shape = _Shape(
            1 + config.num_patches, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_hidden_layers, config.grid_size, config.patch_size, config.num_channels, config.image_size,
            config.layer_norm_eps, config.rms_norm_eps,
        )  # fmt: skip
        tensors = [tensor for some in (shared, *layers) for tensor in some]
        self._tensors = [_panels(tensor, dtype, shape) for tensor, shape in zip(tensors, _shapes(config), strict=True)]
        self._weights = (ctypes.c_void_p * len(self._tensors))(*(tensor.data_ptr() for tensor in self._tensors))
        self._dtype = dtype
        self._kept = threading.local()
        self._bytes_of_picture = self._call(None, False, 0, False, None, None, 1)

    def __call__(self, pictures: torch.Tensor, cls_only: bool) -> torch.Tensor:
        """uint8[B, H, W, C] or float[B, C, H, W] -> float32[B, 1+N, D], or float32[B, 1, D] for CLS alone.

        Raises:
            BufferError: the pictures have another shape or device.
        """
        shape, running, count = self._shape, threads(), len(pictures)
        raw, tokens = pictures.dtype == torch.uint8, 1 if cls_only else shape.tokens
        pictures = (pictures if raw else pictures.float()).contiguous()
        sides = (shape.height, shape.height)
        given = (
            address(pictures, torch.uint8, count, *sides, shape.channels)
            if raw
            else address(pictures, torch.float32, count, shape.channels, *sides)
        )
        encoded = torch.empty(count, tokens, shape.width, dtype=torch.float32, device="cpu")
        needed, work = self._bytes_of_picture * running, getattr(self._kept, "work", None)
        if work is None or len(work) < needed:
            # The memory is kept, because new pages may take longer than the computation. Keys and values are multiplied in
            # whole panels, so the parts that no token writes must be zero. They stay zero.
            work = self._kept.work = torch.zeros(needed, dtype=torch.uint8, device="cpu")
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
        library = _library()
        assert library is not None
        function = library.encode_bfloat16 if self._dtype == torch.bfloat16 else library.encode_float32
        shape = ctypes.byref(self._shape)
        return int(function(shape, self._weights, pictures, raw, count, cls_only, work, out, running))


def _shapes(config: OmniVisionConfig) -> list[tuple[int, ...]]:
    """Shapes of all tensors, in the order of `compiled_encoder.cpp`."""
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    pixels = config.num_channels * config.patch_size**2
    start = ((1 + config.num_patches) * width,)
    shared = [
        (width, pixels), start, (width, pixels), start, (width,),
        (heads * width, width), (heads * width,), (width, heads * width), (width,),
    ]  # fmt: skip
    layer = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (inner, width), (inner,), (width, inner), (width,),
    ]  # fmt: skip
    return [*shared, *layer * config.num_hidden_layers]


def is_possible(config: OmniVisionConfig, dtype: torch.dtype) -> bool:
    """Whether there is a compiled function for this encoder and this type.

    Widths must be multiples of a panel, and the activation the exact GELU.
    """
    if config.hidden_act != "gelu" or (library := _library()) is None:
        return False
    if dtype == torch.bfloat16 and not hasattr(library, "encode_bfloat16"):
        return False
    panel = library.encoder_panel()
    return all(width % panel == 0 for width in (config.hidden_size, config.head_dim, config.intermediate_size))


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
    library = compile_library(Path(__file__).with_name("compiled_encoder.cpp"), "encode_float32", "encoder_panel")
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    for name in ("encode_float32", "encode_bfloat16"):
        if function := getattr(library, name, None):
            function.argtypes = [pointer, pointer, pointer, number, count, number, pointer, pointer, number]
            function.restype = ctypes.c_size_t
    return library
