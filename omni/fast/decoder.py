"""The layers of a small Llama-like Thinker as one function of machine code: `decoder.cpp`, see `omni.fast.compilation`."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from omni.fast.compilation import compile_library

WIDTH = 1024
"""Of a Thinker at most; in wider ones a step is spent in its products, and others multiply better."""

TOKENS = 128
"""At a time, of all rows together; for more oneDNN is quicker. `MOST` of `decoder.cpp`."""


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
    """What is the same in all layers: T, F, h heads and g groups of d, and the constants of norms and attention."""

    width: int
    inner: int
    heads: int
    groups: int
    depth: int
    epsilon: float
    head_epsilon: float
    scaling: float


class CompiledLayers:
    """Layers and the norm after them.

    Args:
        layers: of each its modules, in the order of `decoder.cpp`: norm, query, key, value, norms of queries and of keys (or
            None), output, norm, gate, up, down.
        norm: the last one.
    """

    def __init__(self, layers: Sequence[Sequence[nn.Module | None]], norm: nn.Module, dimensions: Dimensions) -> None:
        places: list[tuple[dict[str, Any], str]] = []
        for layer in (*layers, [norm]):
            for module in layer:
                parameters = {} if module is None else vars(module)["_parameters"]
                places.append((parameters, "weight"))
                if isinstance(module, nn.Linear):
                    places.append((parameters, "bias"))
        self._places, self._layers, self._dimensions = places, len(layers), dimensions
        self._shapes = [getattr(parameters.get(name), "shape", None) for parameters, name in places]

    @property
    def groups(self) -> int:
        """Of keys and values."""
        return self._dimensions.groups

    def weights(self) -> Any:
        """Where the weights are now, for `__call__`; None if not all are plain float32 in the shapes that they had."""
        found = [parameters.get(name) for parameters, name in self._places]
        for weight, shape in zip(found, self._shapes, strict=True):
            if weight is None and shape is None:
                continue
            if weight is None or weight.shape != shape or weight.dtype is not torch.float32:
                return None
            if not (weight.is_cpu and weight.is_contiguous()):
                return None
        return (ctypes.c_void_p * len(found))(*(None if weight is None else weight.data_ptr() for weight in found))

    def __call__(
        self,
        weights: Any,
        hidden: torch.Tensor,
        seen: torch.Tensor | None,
        cosines: torch.Tensor,
        sines: torch.Tensor,
        caches: Sequence[torch.Tensor],
        held: int,
    ) -> torch.Tensor:
        """Compute the last hidden state, float32[B, n, T], and write what the cache has to hold.

        Args:
            weights: see there.
            hidden: float32[B, n, T], the embedded tokens; at most `TOKENS`.
            seen: bool[B, L]; None for all.
            cosines, sines: float32[B, n, d] of the rotary positions, sines of the first half with their sign turned.
            caches: keys and values of each layer, float32[B, g, room, d] with room for L tokens.
            held: tokens that are there already.
        """
        (batch, tokens, _), size, threads = hidden.shape, self._dimensions, torch.get_num_threads()
        rows, length = batch * tokens, held + tokens
        *sizes, epsilon, head_epsilon, scaling = size
        shape = _Shape(batch, tokens, *sizes, self._layers, held, epsilon, head_epsilon, scaling)
        rooms = (ctypes.c_long * self._layers)(*(tensor.shape[2] for tensor in caches[::2]))
        held_at = (ctypes.c_void_p * len(caches))(*(tensor.data_ptr() for tensor in caches))
        x = hidden.clone(memory_format=torch.contiguous_format)
        cosines, sines = cosines.contiguous(), sines.contiguous()
        visible = None if seen is None else seen.contiguous()
        projected = 2 * (size.heads + size.groups) * size.depth
        work = torch.empty(rows * (projected + size.inner) + threads * (rows * size.width + length + 64))
        library = _library()
        assert library is not None
        library.decode(
            ctypes.byref(shape), weights, x.data_ptr(), cosines.data_ptr(), sines.data_ptr(),
            None if visible is None else visible.data_ptr(), held_at, rooms, work.data_ptr(), threads,
        )  # fmt: skip
        return x


def is_possible(dimensions: Dimensions) -> bool:
    """Whether layers of this shape can be compiled here."""
    library = _library()
    if library is None or dimensions.width > WIDTH:
        return False
    multiple = library.decoder_multiple()
    return all(size % multiple == 0 for size in (dimensions.width, dimensions.inner, dimensions.depth))


@cache
def _library() -> ctypes.CDLL | None:
    library = compile_library(Path(__file__).with_name("decoder.cpp"))
    if library is not None:
        library.decode.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int]
        library.decode.restype = None
    return library
