"""An encoder made fast for one purpose, which says how far it is from the encoder itself.

    engine = Engine(load_encoder("checkpoints/vision_tiny"), what="cls", precision="bfloat16")
    rows = engine(np.stack([engine.prepare(picture) for picture in pictures]))  # float32[B, 1, D]
    print(engine.path, engine.error)

Where the encoder brings a packed form (`Modality.pack`), pictures stay bytes until the first product; any other encoder
runs as it is. Where the processor is no faster in bfloat16, arithmetic stays float32. The first thing an engine does is to
encode a few pictures both ways and compare: a fast way that is further off than rounding explains is not taken.
"""

import itertools
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from omni import scenes
from omni.fast.jpeg import Pixels
from omni.fast.resizing import resize
from omni.loading.encoder import Encoder
from omni.registry import get_modality

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
        path: "compiled", "packed" or "as it is".
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
        tried = ["bfloat16", "float32"] if dtype == "bfloat16" else ["float32"]
        precisions = tried if precision == "auto" else [precision]
        packings = [_packing(encoder), None] if _packing(encoder) else [None]
        for self.precision, pack in itertools.product(precisions, packings):
            self.dtype: DType = dtype if self.precision == "bfloat16" else "float32"
            self.path, self._run = self._make(getattr(torch, self.dtype), pack)
            found = torch.from_numpy(self(np.stack([self.prepare(picture) for picture in probes])))
            self.error = ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
            if self.error <= TOLERANCE[self.precision] or (self.precision, pack) == ("float32", None):
                return  # the last is the encoder itself
        raise EngineError(
            f"In {self.precision} this encoder's tokens are off by {self.error:.2g} of their length, more than the "
            f"{TOLERANCE[self.precision]:g} that rounding explains; use float32."
        )

    def prepare(self, picture: Pixels) -> NDArray[Any]:
        """One picture of any size -> uint8[H, W, 3], or float32[3, H, W] for an encoder that is not packed.

        Raises:
            EngineError: an image processor that does not scale pictures, and one of another size than it takes.
        """
        if self.path == "as it is":
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture[..., :3])
            pixels = self.encoder.prepare([image])[0]
            if pixels.shape != self._pixels:
                raise EngineError(
                    f"The encoder takes pictures of one size, expected {_size(self._pixels)} pixels, found "
                    f"{_size(pixels.shape)}; scale them first, as its image processor does not."
                )
            return pixels.float().numpy()
        processor = self.encoder.image_processor
        return resize(picture, processor.size["width"], processor.size["height"], processor.resample)

    def __call__(self, prepared: NDArray[Any]) -> NDArray[np.float32]:
        """B pictures as `prepare` makes them -> float32[B, n, D]."""
        return self._run(torch.from_numpy(prepared)).float().numpy()

    def _make(
        self, dtype: torch.dtype, pack: Callable[..., Any] | None
    ) -> tuple[str, Callable[[torch.Tensor], torch.Tensor]]:
        encoder, what = self.encoder, self.what
        if pack is None:
            return "as it is", lambda pixel_values: _autocast(encoder, pixel_values, dtype)[what]
        scale, shift = _scale_and_shift(encoder.image_processor)
        packed = pack(encoder.model, dtype, scale=scale, shift=shift)
        frame = torch.empty(1, 3, encoder.side, encoder.side, device="meta")
        path = "compiled" if getattr(packed, "is_compiled", False) else "packed"
        return path, lambda pictures: encoder.name(packed(pictures, cls_only=what == "cls"), frame)[what]


def _size(shape: torch.Size) -> str:
    """Width and height of float[3, H, W]."""
    return f"{shape[-1]} x {shape[-2]}"


def _packing(encoder: Encoder) -> Callable[..., Any] | None:
    """The packed form of this encoder, if it is on a CPU and its pictures are made as the modality has it."""
    modality, processor = get_modality("image"), encoder.image_processor
    own = type(encoder.model) is modality.model_class and type(processor) is modality.preprocessor_class
    return modality.pack if own and processor.do_resize and encoder.model.device.type == "cpu" else None


def _scale_and_shift(processor: Any) -> tuple[list[float], list[float]]:
    """`pixel_values = pixel * scale + shift` for each channel, as an image processor's settings have it."""
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    if not processor.do_normalize:
        return [rescale] * 3, [0.0] * 3
    scale = [rescale / std for std in processor.image_std]
    return scale, [-mean / std for mean, std in zip(processor.image_mean, processor.image_std, strict=True)]


def _autocast(encoder: Encoder, pixel_values: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    pixel_values = pixel_values.to(encoder.model.device, encoder.model.dtype)
    with torch.autocast(encoder.model.device.type, dtype, enabled=dtype != torch.float32):
        return {name: tokens.cpu() for name, tokens in encoder.encode(pixel_values).items()}


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16 than in float32; some that know both do not."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, times = torch.ones(384, 384, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def _probes(encoder: Encoder) -> list[Image.Image]:
    """A few pictures of every kind: scenes, to be scaled if that is done, and noise, which no encoder was trained on."""
    side = encoder.side
    sizes = [(side, side), (3 * side, 2 * side), (side, 2 * side)]
    if not getattr(encoder.image_processor, "do_resize", False):
        sizes = [(side, side)] * 3
    drawn = [scenes.render(scenes.sample_scene(seed, "test")).resize(size) for seed, size in enumerate(sizes)]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return [*drawn, Image.fromarray(noise)]
