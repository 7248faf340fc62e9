"""An encoder made fast for one purpose. It reports how far its tokens are from those of the encoder itself.

    engine = Engine(load_encoder("checkpoints/vision_tiny"), what="cls", precision="bfloat16")
    rows = engine([engine.prepare(picture) for picture in pictures])  # float32[1, D] each
    print(engine.path, engine.error)

Where the encoder has a packed form (`Modality.pack`), that is taken; any other runs as it is. Where the processor is no
faster in bfloat16, arithmetic stays float32. The first thing an engine does is to encode a few items of its own both ways
(`Modality.probes`) and compare: a fast way that is further off than rounding explains is not taken.
"""

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from omni.loading.encoder import Encoder
from omni.modality import Packed
from omni.registry import open_item

What = Literal["cls", "grid", "projected"]
Precision = Literal["auto", "float32", "bfloat16"]
DType = Literal["float32", "bfloat16"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""The largest accepted |difference| / |token|: what rounding explains, in bfloat16 with its eight bits."""


class EngineError(ValueError):
    """The engine cannot be made as asked. The message says why, and what to do."""


class Engine:
    """Items of one modality to tokens, in batches. Tokens of an item do not depend on those beside it.

    Args:
        encoder: see `load_encoder`.
        what: "cls" float[1, D]; "grid" float[N, D]; "projected" float[n, T], what a fused model hands its Thinker.
        precision: "float32"; "bfloat16", which allows that dtype and uses it where the processor is faster in it; or
            "auto", which is "bfloat16" where that is faster and the error allows it.
        dtype: the dtype of the arithmetic where "bfloat16" is allowed; by default the faster one.

    Attributes:
        path: how it computes: "as it is", or the name of the packed form.
        precision: "float32" or "bfloat16".
        dtype: the dtype of the arithmetic, "float32" or "bfloat16".
        error: the largest |difference| / |token| to the encoder in float32, one item at a time, over the probes.
        shape: (n, width) of the tokens of one item; n is None where items have different numbers of them.
        longest: n of the largest probe.
        side: the largest extent of a probe's prepared tensors, such as the height of a picture.
        sized: whether items have a width and a height.

    Raises:
        EngineError: the encoder does not have these tokens, they are not finite, its preprocessor makes no batch of its
            items, or the error of "bfloat16" is above `TOLERANCE`.
    """

    def __init__(
        self, encoder: Encoder, what: What = "cls", precision: Precision = "float32", dtype: DType | None = None
    ) -> None:
        for value, known in ((what, get_args(What)), (precision, get_args(Precision))):
            if value not in known:
                raise EngineError(f"Expected one of {', '.join(known)}; found {value!r}.")
        self.encoder, self.what = encoder, what
        try:
            probes = encoder.probes()
        except ValueError as error:
            raise EngineError(str(error)) from error
        alone = [encoder.prepare([probe]) for probe in probes]
        shapes = [{key: tuple(value.shape[1:]) for key, value in inputs.items()} for inputs in alone]
        self.side = max(max(shape[-2:], default=1) for shape in shapes[0].values())
        self.sized = isinstance(getattr(probes[0], "size", None), tuple)
        self._shapes = shapes[0] if all(each == shapes[0] for each in shapes) else None
        if self._shapes is None:
            self._expect_batch(probes, shapes)
        single = [encoder.encode(inputs) for inputs in alone]
        if what not in single[0]:
            raise EngineError(
                f"This encoder has no {what!r}; it has {', '.join(single[0])}."
                + (" Projected tokens are those of a fused model." if what == "projected" else "")
            )
        reference = torch.cat([tokens[what][0] for tokens in single]).float()
        if not reference.isfinite().all():
            raise EngineError(
                f"The encoder's tokens of valid {encoder.bundle.noun}s are not finite, expected numbers; its weights are "
                "damaged, get the checkpoint again."
            )
        counts = encoder.counts(what, [grid for inputs in alone for grid in encoder.grid_shapes(inputs)])
        self.longest = max(counts)
        self.shape: tuple[int | None, int] = (counts[0] if len({*counts}) == 1 else None, reference.shape[-1])
        if dtype is None:
            dtype = "bfloat16" if precision != "float32" and bfloat16_pays() else "float32"
        tried: list[Precision] = ["bfloat16", "float32"] if dtype == "bfloat16" else ["float32"]
        precisions = tried if precision == "auto" else [precision]
        for self.precision in precisions:
            self.dtype: DType = dtype if self.precision == "bfloat16" else "float32"
            for packed in self._forms():
                self._packed, self.path = packed, packed.path if packed else "as it is"
                found = torch.from_numpy(np.concatenate(self([self.prepare(probe) for probe in probes])))
                self.error = ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
                if self.error <= TOLERANCE[self.precision] or (self.precision, packed) == ("float32", None):
                    return  # the last is the encoder itself
        raise EngineError(
            f"In {self.precision} this encoder's tokens are off by {self.error:.2g} of their length, more than the "
            f"{TOLERANCE[self.precision]:g} that rounding explains; use float32."
        )

    def _expect_batch(self, probes: Sequence[Any], shapes: Sequence[dict[str, tuple[int, ...]]]) -> None:
        """Refuse a preprocessor that makes tensors of several shapes and does not pad them."""
        try:
            self.encoder.prepare(probes)
        except (ValueError, RuntimeError, TypeError) as error:
            different = list(dict.fromkeys(map(self._size, shapes)))
            noun = self.encoder.bundle.noun
            raise EngineError(
                f"The preprocessor makes {noun}s of {different[0]} and of {different[1]} {self._unit} and does not pad "
                "them, expected one size for all; let it crop or pad them."
            ) from error

    @property
    def _unit(self) -> str:
        return "pixels" if self.sized else "numbers"

    def _size(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """The size of an item's tensors: "48 x 32", width and height, for a picture; "100 x 80, 100" for a sound."""
        return ", ".join(" x ".join(map(str, shape[:-3:-1] if self.sized else shape)) for shape in shapes.values())

    def _forms(self) -> Iterator[Packed | None]:
        """The packed form of the encoder, if it has one; then None, for the encoder itself."""
        pack = self.encoder.bundle.pack
        if pack and (packed := pack(self.encoder.model, self.encoder.preprocessor, getattr(torch, self.dtype))):
            yield packed
        yield None

    def read(self, path: str, at_least: int | None = None) -> tuple[Any, tuple[int, int] | None, str | None]:
        """An item for `prepare`, its full (width, height), and a note about anything odd in its file.

        Args:
            path: the file.
            at_least: read no more of a picture than is needed for so many pixels a side.

        Raises:
            ItemError: a file that cannot be read.
        """
        if self._packed is not None:
            return self._packed.read(path, at_least)
        opener = open_item(self.encoder.modality)
        item = opener(path) if at_least is None else opener(path, at_least)
        info = getattr(item, "info", None) or {}  # of a picture
        note = info.get("note") or "; ".join(getattr(item, "notes", ())) or None
        return item, info.get("full_size", item.size) if self.sized else None, note

    def scales(self) -> bool:
        """Whether files can be read at a fraction of their size."""
        opener = self.encoder.bundle.open
        return opener is not None and "at_least" in inspect.signature(opener).parameters

    def prepare(self, item: Any) -> Any:
        """One item, from `read` or as the modality has it, in the form that `__call__` takes batches of.

        Raises:
            EngineError: an item of another size than the encoder takes, which its preprocessor leaves as it is.
            ValueError: an item that the preprocessor does not take.
        """
        if self._packed is not None:
            return self._packed.prepare(item)
        inputs = self.encoder.prepare([item])
        if self._shapes is None:  # it will be padded to the others of its batch
            return item
        found = {key: tuple(value.shape[1:]) for key, value in inputs.items()}
        if found != self._shapes:
            raise EngineError(
                f"The encoder takes {self.encoder.bundle.noun}s of one size, expected {self._size(self._shapes)} "
                f"{self._unit}, found {self._size(found)}; scale them first, as its preprocessor does not."
            )
        return inputs

    def __call__(self, prepared: Sequence[Any]) -> list[NDArray[np.float32]]:
        """Items as `prepare` makes them -> float32[n, D] of each."""
        if self._packed is not None:
            batch = self._packed.batch(prepared)
            grids = self._packed.grid_shapes(batch)
            tokens = self.encoder.name(self._packed(batch, cls_only=self.what == "cls"), grids)[self.what]
        else:
            if self._shapes is None:
                inputs = self.encoder.prepare(prepared)
            else:
                inputs = {key: torch.cat([each[key] for each in prepared]) for key in self._shapes}
            grids, dtype = self.encoder.grid_shapes(inputs), getattr(torch, self.dtype)
            with torch.autocast(self.encoder.model.device.type, dtype, enabled=dtype != torch.float32):
                tokens = self.encoder.encode(inputs)[self.what]
        found = tokens.float().cpu().numpy()
        return [each[:count] for each, count in zip(found, self.encoder.counts(self.what, grids), strict=True)]


@cache
def bfloat16_pays() -> bool:
    """Whether this processor multiplies matrices faster in bfloat16 than in float32. Not all that support it are faster."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, times = torch.ones(384, 384, dtype=dtype, device="cpu"), []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < seconds(torch.float32)
