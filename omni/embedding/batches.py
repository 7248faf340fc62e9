"""A batch of picture files to rows of the table: what every thread does, here or on another machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from omni.loading.encoder import Encoder

from .engine import Engine, Precision, What
from .table import record_batch

if TYPE_CHECKING:
    import pyarrow as pa

Decode = Literal["exact", "scaled"]
"""Whole pictures; or JPEG files at 1/2, 1/4 or 1/8 of their size, if that is no smaller than what the encoder gets."""


@dataclass(frozen=True)
class Task:
    """What is to be done with every batch; see `embed`."""

    what: What
    precision: Precision
    decode: Decode
    batch_size: int

    def batches(self, paths: Sequence[str]) -> list[Sequence[str]]:
        """What is encoded together."""
        return [paths[start : start + self.batch_size] for start in range(0, len(paths), self.batch_size)]


def embed_batch(engine: Engine, task: Task, paths: Sequence[str]) -> "pa.RecordBatch":
    """Read, decode, scale and encode some files: a row for each, those without an embedding with the reason."""
    at_least = side(engine.encoder) if task.decode == "scaled" else None
    sizes: list[tuple[int, int] | None] = []
    errors: list[str | None] = []
    notes: list[str | None] = []
    prepared = []
    for path in paths:
        try:
            picture, size, note = engine.read(path, at_least)
            prepared.append(engine.prepare(picture))
        except ValueError as error:  # also of an image processor that does not take every picture
            sizes.append(None)
            errors.append(str(error))
            notes.append(None)
        else:
            sizes.append(size)
            errors.append(None)
            notes.append(note)
    embeddings = np.zeros((len(paths), *engine.shape), np.float32)
    if prepared:
        embeddings[[error is None for error in errors]] = engine(np.stack(prepared))
    for row in np.flatnonzero(~np.isfinite(embeddings).all(axis=(1, 2))).tolist():
        errors[row] = f"The encoder's tokens of {paths[row]!r} are not finite, expected numbers; check its weights."
    return record_batch(paths, sizes, errors, notes, embeddings[:, 0] if task.what == "cls" else embeddings)


def side(encoder: Encoder) -> int:
    """The most pixels of a side to which its image processor scales a picture before anything is cut off."""
    sizes = dict(getattr(encoder.image_processor, "size", None) or {})
    return max(encoder.side, *(size for size in sizes.values() if size))
