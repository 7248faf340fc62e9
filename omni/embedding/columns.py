"""The columns of a table of embeddings, and how paths are written in it.

| column    | type                              | holds                                                                  |
|-----------|-----------------------------------|------------------------------------------------------------------------|
| path      | string                            | the path of the file; a byte that is no text is written as \\udcff and  |
|           |                                   | the like, and so a backslash is written as two                         |
| width     | int32                             | of pictures alone: width of the whole one, upright; null if it cannot  |
|           |                                   | be read                                                                |
| height    | int32                             | its height                                                             |
| error     | string                            | why there is no embedding, in a sentence; null if there is one         |
| note      | string                            | a warning of the decoder about a file that is complete; null if none   |
| embedding | fixed_size_list<float>[D]         | its CLS token, of length 1 if asked for; null if there is an error     |
|           | fixed_size_list<..[D]>[n]         | or the n tokens of its grid, or those that the Thinker gets; a list    |
|           |                                   | of any length where items have different numbers of them               |
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Shape = tuple[int | None, ...]
"""The shape of an embedding: (D,); (n, D); or (None, D), if every item has its own number of tokens."""


def schema(shape: Shape, sized: bool = True) -> "pa.Schema":
    """The columns for embeddings float32[*shape], of items with or without a width and a height."""
    import pyarrow as pa

    embedding = pa.float32()
    for size in reversed(shape):
        embedding = pa.list_(embedding, -1 if size is None else size)
    sizes = {"width": pa.int32(), "height": pa.int32()} if sized else {}
    return pa.schema({"path": pa.string(), **sizes, "error": pa.string(), "note": pa.string(), "embedding": embedding})


def record_batch(
    paths: Sequence[str],
    sizes: Sequence[tuple[int, int] | None] | None,
    errors: Sequence[str | None],
    notes: Sequence[str | None],
    embeddings: Sequence[Any],
    shape: Shape,
) -> "pa.RecordBatch":
    """Rows.

    Args:
        paths: a file for each.
        sizes: (width, height), or None where it is not known; None for items that have none.
        errors: why there is no embedding, or None.
        notes: a warning, or None.
        embeddings: float32[n, D], for (D,) of one token; or None.
        shape: of an embedding in the table.
    """
    import pyarrow as pa

    columns = [pa.array([written(path) for path in paths], pa.string())]
    if sizes is not None:
        columns += [pa.array([size[axis] if size else None for size in sizes], pa.int32()) for axis in (0, 1)]
    columns += [pa.array([_text(text) if text else None for text in texts], pa.string()) for texts in (errors, notes)]
    return pa.record_batch([*columns, _lists(embeddings, shape)], schema=schema(shape, sizes is not None))


def _lists(embeddings: Sequence[Any], shape: Shape) -> "pa.Array":
    """The column of embeddings; zeros lie under the rows that have none."""
    import pyarrow as pa

    width, tokens = shape[-1], shape[0] if len(shape) == 2 else 1
    assert width is not None, "tokens are of one width"
    missing = pa.array([each is None for each in embeddings])
    rows = [np.zeros((tokens or 0, width), np.float32) if each is None else each for each in embeddings]
    values = pa.array(np.concatenate([*rows, np.zeros((0, width), np.float32)]).reshape(-1))
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(values, width, mask=missing)
    values = pa.FixedSizeListArray.from_arrays(values, width)
    if tokens is not None:
        return pa.FixedSizeListArray.from_arrays(values, tokens, mask=missing)
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), values, mask=missing)


def written(path: str) -> str:
    """A path in the form that stands in the table."""
    return _text(path.replace("\\", r"\\"))


def original(path: str) -> str:
    """The path of a file from the form that the table has."""
    return re.sub(r"\\(\\|u(dc[0-9a-f]{2}))", lambda found: chr(int(found[2], 16)) if found[2] else "\\", path)


def _text(name: str) -> str:
    """Text without lone surrogates. Bytes of a file name that are no text become \\udcff and the like."""
    return name.encode(errors="backslashreplace").decode()
