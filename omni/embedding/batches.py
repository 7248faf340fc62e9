"""A batch of files becomes rows of the table. Every thread does this, here or on another machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .columns import record_batch
from .engine import Engine, Precision, What

if TYPE_CHECKING:
    import pyarrow as pa

Decode = Literal["exact", "scaled"]
"""Whole pictures; or JPEG files at 1/2, 1/4 or 1/8 of their size, if that is no smaller than what the encoder gets."""


@dataclass(frozen=True)
class Task:
    """The settings for every batch; see `embed`."""

    what: What
    precision: Precision
    decode: Decode
    batch_size: int
    normalized: bool = False

    def batches(self, paths: Sequence[str]) -> list[Sequence[str]]:
        """The files of each batch."""
        return [paths[start : start + self.batch_size] for start in range(0, len(paths), self.batch_size)]


def embed_batch(engine: Engine, task: Task, paths: Sequence[str]) -> "pa.RecordBatch":
    """Read, decode, prepare and encode some files: a row for each, those without an embedding with the reason."""
    at_least = side(engine) if task.decode == "scaled" else None
    sizes: list[tuple[int, int] | None] = []
    errors: list[str | None] = []
    notes: list[str | None] = []
    prepared = []
    for path in paths:
        try:
            item, size, note = engine.read(path, at_least)
            prepared.append(engine.prepare(item))
        except ValueError as error:  # the preprocessor may not take every item, either
            sizes.append(None)
            errors.append(str(error))
            notes.append(None)
        else:
            sizes.append(size)
            errors.append(None)
            notes.append(note)
    encoded = iter(engine(prepared) if prepared else [])
    embeddings: list[Any] = [next(encoded) if error is None else None for error in errors]
    for row, tokens in enumerate(embeddings):
        if tokens is None:
            continue
        length = np.linalg.norm(tokens, axis=-1, keepdims=True)
        if not np.isfinite(tokens).all():
            errors[row] = f"The encoder's tokens of {paths[row]!r} are not finite, expected numbers; check its weights."
        elif task.normalized and not length.all():
            errors[row] = f"A token of {paths[row]!r} has length 0, expected a direction; embed without --normalize."
        elif task.normalized:
            embeddings[row] = tokens / length
        if errors[row] is not None:
            embeddings[row] = None
    return record_batch(paths, sizes if engine.sized else None, errors, notes, embeddings, columns(engine))


def columns(engine: Engine) -> tuple[int | None, ...]:
    """The shape of an embedding in the table: (D,), (n, D), or (None, D) for any number of tokens."""
    return engine.shape[1:] if engine.what == "cls" else engine.shape


def side(engine: Engine) -> int:
    """The longest side, in pixels, to which the image processor scales a picture before it cuts anything off."""
    sizes = dict(getattr(engine.encoder.preprocessor, "size", None) or {})
    return max(engine.side, *(size for size in sizes.values() if size))
