"""An encoder made fast for one purpose, which says how far it is from the encoder itself.

    engine = Engine(load_encoder("checkpoints/vision_tiny"), what="cls", precision="bfloat16")
    rows = engine(np.stack([engine.prepare(picture) for picture in pictures]))  # float32[B, 1, D]
    print(engine.path, engine.error)

Where the encoder has a packed form (`Modality.pack`), that is taken; any other runs as it is. Where the processor is no
faster in bfloat16, arithmetic stays float32. The first thing an engine does is to encode a few pictures both ways and
compare: a fast way that is further off than rounding explains is not taken.
"""

import time
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from omni.loading.encoder import Encoder
from omni.registry import Packed, get_modality, open_item

What = Literal["cls", "grid", "projected"]
Precision = Literal["auto", "float32", "bfloat16"]
DType = Literal["float32", "bfloat16"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""The largest |difference| / |token| that may be: rounding alone, and no more than bfloat16's eight bits explain."""


class EngineError(ValueError):
    """An engine that cannot be had as asked. The message says why, and what to do."""


class Engine:
    """Pictures to tokens, in batches.

    Args:
        encoder: see `load_encoder`.
        what: "cls" float[B, 1, D]; "grid" float[B, N, D]; "projected" float[B, n, T], what a fused model hands its Thinker.
        precision: how exact it has to be. "bfloat16" allows to compute in it, and is computed in it where the processor is
            faster so; "auto" is that where it is faster and the error allows it, else float32.
        dtype: in what it is computed where "bfloat16" is allowed, by default in what is faster.

    Attributes:
        path: how it computes: "as it is", or what the packed form calls itself.
        precision: "float32" or "bfloat16".
        dtype: in what it is computed, "float32" or "bfloat16".
        error: the largest |difference| / |token| to the encoder in float32, one picture at a time, over the probe pictures.
        shape: (n, width) of the tokens of one picture.

    Raises:
        EngineError: tokens that the encoder does not have or that are no numbers, pictures that its image processor makes of
            different sizes, or a bfloat16 that is asked for and off by more than `TOLERANCE`.
    """

    def __init__(
        self, encoder: Encoder, what: What = "cls", precision: Precision = "float32", dtype: DType | None = None
    ) -> None:
        for value, known in ((what, get_args(What)), (precision, get_args(Precision))):
            if value not in known:
                raise EngineError(f"Expected one of {', '.join(known)}; found {value!r}.")
        self.encoder, self.what = encoder, what
        probes = _probes(encoder)
        pixels = [encoder.prepare([picture]) for picture in probes]
        self._pixels = pixels[0].shape[1:]
        if other := next((each.shape[1:] for each in pixels if each.shape[1:] != self._pixels), None):
            raise EngineError(
                f"The image processor makes pictures of {_size(self._pixels)} and of {_size(other)} pixels, expected one "
                "size for all; let it crop them."
            )
        single = [encoder.encode(each) for each in pixels]
        if what not in single[0]:
            raise EngineError(
                f"This encoder has no {what!r}; it has {', '.join(single[0])}."
                + (" Projected tokens are those of a fused model." if what == "projected" else "")
            )
        reference = torch.cat([tokens[what] for tokens in single])
        if not reference.isfinite().all():
            raise EngineError(
                "The encoder's tokens of ordinary pictures are not finite, expected numbers; its weights are damaged, get "
                "the checkpoint again."
            )
        self.shape: tuple[int, int] = (reference.shape[1], reference.shape[2])
        if dtype is None:
            dtype = "bfloat16" if precision != "float32" and bfloat16_pays() else "float32"
        tried: list[Precision] = ["bfloat16", "float32"] if dtype == "bfloat16" else ["float32"]
        precisions = tried if precision == "auto" else [precision]
        for self.precision in precisions:
            self.dtype: DType = dtype if self.precision == "bfloat16" else "float32"
            for packed in self._forms():
                self._packed, self.path = packed, packed.path if packed else "as it is"
                found = torch.from_numpy(self(np.stack([self.prepare(picture) for picture in probes])))
                self.error = ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
                if self.error <= TOLERANCE[self.precision] or (self.precision, packed) == ("float32", None):
                    return  # the last is the encoder itself
        raise EngineError(
            f"In {self.precision} this encoder's tokens are off by {self.error:.2g} of their length, more than the "
            f"{TOLERANCE[self.precision]:g} that rounding explains; use float32."
        )

    def _forms(self) -> Iterator[Packed | None]:
        """The packed form of the encoder, if it has one; then None, for the encoder itself."""
        pack = get_modality("image").pack
        if pack and (packed := pack(self.encoder.model, self.encoder.image_processor, getattr(torch, self.dtype))):
            yield packed
        yield None

    def read(self, path: str, at_least: int | None = None) -> tuple[Any, tuple[int, int], str | None]:
        """A picture for `prepare`, the (width, height) that it has in full, and what its decoder notes.

        Raises:
            ItemError: a file that cannot be read.
        """
        if self._packed is not None:
            return self._packed.read(path, at_least)
        picture = open_item("image")(path, at_least)
        return picture, picture.info.get("full_size", picture.size), picture.info.get("note")

    def prepare(self, picture: Any) -> NDArray[Any]:
        """One picture of any size, as `read` gives it or as an image of PIL, as what `__call__` takes a batch of.

        Raises:
            EngineError: an image processor that does not scale pictures, and one of another size than it takes.
        """
        if self._packed is not None:
            prepared: NDArray[Any] = self._packed.prepare(picture)
            return prepared
        pixels = self.encoder.prepare([picture])[0]
        if pixels.shape != self._pixels:
            raise EngineError(
                f"The encoder takes pictures of one size, expected {_size(self._pixels)} pixels, found "
                f"{_size(pixels.shape)}; scale them first, as its image processor does not."
            )
        return pixels.float().cpu().numpy()

    def __call__(self, prepared: NDArray[Any]) -> NDArray[np.float32]:
        """B pictures as `prepare` makes them, one array -> float32[B, n, D]."""
        pictures = torch.from_numpy(prepared)
        if self._packed is not None:
            frame = torch.empty(1, *self._pixels, device="meta")
            tokens = self.encoder.name(self._packed(pictures, cls_only=self.what == "cls"), frame)
        else:
            tokens = _autocast(self.encoder, pictures, getattr(torch, self.dtype))
        return tokens[self.what].float().numpy()


def _size(shape: torch.Size) -> str:
    """Width and height of float[3, H, W]."""
    return f"{shape[-1]} x {shape[-2]}"


def _autocast(encoder: Encoder, pixel_values: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    pixel_values = pixel_values.to(encoder.model.device, encoder.model.dtype)
    with torch.autocast(encoder.model.device.type, dtype, enabled=dtype != torch.float32):
        return {name: tokens.cpu() for name, tokens in encoder.encode(pixel_values).items()}


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16 than in float32; some that know both do not."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, times = torch.ones(384, 384, dtype=dtype, device="cpu"), []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def _probes(encoder: Encoder) -> list[Image.Image]:
    """A few pictures that no encoder was trained on: noise and gradients of several sizes, if pictures are scaled."""
    side, random = encoder.side, np.random.default_rng(0)
    sizes = [(side, side), (3 * side, 2 * side), (side, 2 * side)]
    if not getattr(encoder.image_processor, "do_resize", False):
        sizes = [(side, side)] * 3
    noise = [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    across, down = np.meshgrid(np.linspace(0, 255, side), np.linspace(255, 0, side))
    gradient = np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8)
    return [Image.fromarray(each) for each in (*noise, gradient)]
