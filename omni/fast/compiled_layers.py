"""The layers of a small Llama-like Thinker as one function of machine code, `compiled_layers.cpp`."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from omni.fast.compilation import address, compile_library, fits, threads

WIDTH = 1024
"""Largest width of a Thinker. In a wider one most time goes into products, which torch computes faster."""

TOKENS = 128
"""Most tokens of a call, in all rows together; for more, oneDNN is faster. It is `MOST` in `compiled_layers.cpp`."""


class _Shape(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_long)
            for name in ("batch", "tokens", "width", "inner", "heads", "groups", "depth", "layers")
        ),
        ("held", ctypes.c_long),
        *((name, ctypes.c_float) for name in ("epsilon", "head_epsilon", "scaling")),
    ]


class Dimensions(NamedTuple):
    """The numbers that all layers share: T, F, h heads and g groups of d, and the constants of norms and attention."""

    width: int
    inner: int
    heads: int
    groups: int
    depth: int
    epsilon: float
    head_epsilon: float
    scaling: float


class Weights(NamedTuple):
    """The weights as machine code takes them.

    Attributes:
        pointers: where each is; None for one that a layer lacks.
        kept: the same as tensors. They keep the memory valid while machine code reads it: another thread may meanwhile move
            the model, load it again, or put adapters into it.
    """

    pointers: list[int | None]
    kept: list[torch.Tensor | None]


class CompiledLayers:
    """The layers of a Thinker and the norm after them.

    Args:
        layers: the modules of each layer, in the order of `compiled_layers.cpp`: norm, query, key, value, norms of queries
            and keys (or None), output, norm, gate, up, down.
        norm: the last norm.
        dimensions: their sizes.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module | None]], norm: nn.Module, dimensions: Dimensions) -> None:
        places: list[tuple[dict[str, Any], str]] = []
        for layer in (*layers, [norm]):
            for module in layer:
                parameters = {} if module is None else vars(module)["_parameters"]
                places.append((parameters, "weight"))
                if isinstance(module, nn.Linear):
                    places.append((parameters, "bias"))
        shapes = [*_shapes(dimensions) * len(layers), (dimensions.width,)]
        may_lack = [name == "bias" or not parameters for parameters, name in places]  # a norm may be None
        self._weights = list(zip(places, shapes, may_lack, strict=True))
        self._layers, self._dimensions = len(layers), dimensions
        self._last: Weights | None = None

    @property
    def groups(self) -> int:
        """Groups of keys and values."""
        return self._dimensions.groups

    def weights(self) -> Weights | None:
        """The present weights, for `__call__`; None unless all are plain float32 of the expected shapes."""
        last = self._last
        pointers, kept = list[int | None](), list[torch.Tensor | None]()
        for number, ((parameters, name), shape, may_lack) in enumerate(self._weights):
            weight = parameters.get(name)
            if weight is None and may_lack:
                pointers.append(None)
                kept.append(None)
                continue
            if weight is None or not fits(weight, torch.float32, *shape):
                return None
            # not by `detach`: as an operation it gives up Python's lock, and another thread could free the memory first
            tensor = last.kept[number] if last and last.pointers[number] == weight.data_ptr() else weight.data
            if tensor is None or not fits(tensor, torch.float32, *shape) or not (pointer := tensor.data_ptr()):
                return None  # it was exchanged just now, or its memory was given back
            pointers.append(pointer)
            kept.append(tensor)
        if last is None or last.pointers != pointers:
            last = self._last = Weights(pointers, kept)
        return last

    def release(self) -> None:
        """Keep no weights that the model may have given up."""
        self._last = None

    def __call__(
        self,
        weights: Weights,
        hidden: torch.Tensor,
        seen: torch.Tensor | None,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        caches: Sequence[torch.Tensor],
        held: int,
    ) -> torch.Tensor:
        """Compute the last hidden state, float32[B, n, T], and write keys and values into the cache.

        Args:
            weights: as `weights` returns them.
            hidden: float32[B, n, T], at most `TOKENS` embedded tokens.
            seen: bool[B, L], true for tokens that are seen; None for all.
            cosines, sines: float32[B, n, d] of the rotary positions. The sines of the first half have the opposite sign.
            caches: keys and values of each layer, float32[B, g, room, d] with room for L tokens.
            held: how many tokens the cache holds already.

        Raises:
            BufferError: a tensor has another type, shape, order or device.
        """
        size, running = self._dimensions, threads()
        *sizes, epsilon, head_epsilon, scaling = size
        batch, tokens = hidden.shape[:2]
        rows, length = batch * tokens, held + tokens
        rooms = [keys.shape[2] for keys in caches[::2]]
        if not 0 < rows <= TOKENS or min(rooms) < length or len(rooms) != self._layers:
            raise BufferError(
                f"Expected 1 to {TOKENS} tokens and room for {length} in each of {self._layers} layers, found {rows} tokens "
                f"and room for {rooms}."
            )
        shape = _Shape(batch, tokens, *sizes, self._layers, held, epsilon, head_epsilon, scaling)
        held_at = [
            address(tensor, torch.float32, batch, size.groups, room, size.depth)
            for tensor, room in zip(caches, (room for room in rooms for _ in "kv"), strict=True)
        ]
        x = hidden.clone(memory_format=torch.contiguous_format)
        cosines, sines = cosines.contiguous(), sines.contiguous()
        visible = None if seen is None else seen.contiguous()
        projected = 2 * (size.heads + size.groups) * size.depth
        work_size = rows * (projected + size.inner) + running * (rows * size.width + length + 64)
        work = torch.empty(work_size, dtype=torch.float32, device="cpu")
        library = _library()
        assert library is not None
        library.run_layers(
            ctypes.byref(shape),
            (ctypes.c_void_p * len(weights.pointers))(*weights.pointers),
            address(x, torch.float32, batch, tokens, size.width),
            address(cosines, torch.float32, batch, tokens, size.depth),
            address(sines, torch.float32, batch, tokens, size.depth),
            None if visible is None else address(visible, torch.bool, batch, length),
            (ctypes.c_void_p * len(held_at))(*held_at),
            (ctypes.c_long * self._layers)(*rooms),
            address(work, torch.float32, work_size),
            running,
        )
        return x


def _shapes(size: Dimensions) -> list[tuple[int, ...]]:
    """Shapes of a layer's weights, in the order of `compiled_layers.cpp`."""
    heads, groups = size.heads * size.depth, size.groups * size.depth
    return [
        (size.width,),
        (heads, size.width), (heads,), (groups, size.width), (groups,), (groups, size.width), (groups,),
        (size.depth,), (size.depth,),
        (size.width, heads), (size.width,),
        (size.width,),
        (size.inner, size.width), (size.inner,), (size.inner, size.width), (size.inner,),
        (size.width, size.inner), (size.width,),
    ]  # fmt: skip


def is_possible(dimensions: Dimensions) -> bool:
    """Whether layers of this shape can be compiled here."""
    library = _library()
    if library is None or dimensions.width > WIDTH or dimensions.heads % dimensions.groups:
        return False
    multiple = library.layers_multiple()
    return all(size % multiple == 0 for size in (dimensions.width, dimensions.inner, dimensions.depth))


@cache
def _library() -> ctypes.CDLL | None:
    library = compile_library(Path(__file__).with_name("compiled_layers.cpp"), "run_layers", "layers_multiple")
    if library is not None:
        library.run_layers.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int]
        library.run_layers.restype = None
    return library
