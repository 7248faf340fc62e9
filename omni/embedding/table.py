"""Read a table of embeddings, a Parquet file or a folder of them.

The schema's metadata has a JSON document under the key `omni`, which says what the rows depend on; `describe` reads it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omni.files import expect_ordinary

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"omni"


class TableError(ValueError):
    """The output cannot be written or continued. The message is one sentence: what was found, what to do."""


def describe(path: str | Path) -> dict[str, Any]:
    """The document of a table, a Parquet file or a folder of them. It holds everything that the rows depend on.

    Raises:
        TableError: there is no table of `omni embed`, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = table_files(path)[0]
    try:
        return dict(json.loads(pq.read_schema(file).metadata[KEY]))
    except PermissionError as error:
        raise TableError(f"{str(file)!r} may not be read by this user; change its permissions.") from error
    except (KeyError, TypeError, ValueError, RecursionError, OSError, pa.ArrowException) as error:
        raise TableError(
            f"{str(file)!r} is not a table that `omni embed` wrote, or it is damaged; remove it, and --resume makes it "
            "again, or name another output."
        ) from error


def table_files(path: str | Path) -> list[Path]:
    """The files of a table, in the order of its rows.

    Raises:
        TableError: there is nothing, or a folder with no part of a table.
    """
    file = Path(path)
    if not os.path.isdir(file):  # false also of names that none can have
        return [_ordinary(file)]
    parts = [_ordinary(part) for part in sorted(file.glob("part-*.parquet"))]
    if not parts:
        raise TableError(f"{str(path)!r} is not a table that `omni embed` wrote; name another one.")
    return parts


def _ordinary(file: Path) -> Path:
    try:
        return expect_ordinary(file)
    except OSError as error:  # a name that none can have, too
        raise TableError(
            f"{str(file)!r} is not a table that `omni embed` wrote ({error.strerror or error}); name another one."
        ) from error


def read_rows(file: Path, columns: list[str]) -> Iterator["pa.Table"]:
    """The rows of a file of a table, some at a time. All checksums of what is read are compared.

    Raises:
        TableError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            for group in range(opened.num_row_groups):
                yield opened.read_row_group(group, columns)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from error


def read_vectors(file: Path) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """The paths, and the vectors float32[n, D], of the rows of a file that have one, some at a time.

    Raises:
        TableError: it is damaged, or holds something else.
    """
    import pyarrow as pa

    for rows in read_rows(file, ["path", "embedding"]):
        if rows.column_names != ["path", "embedding"]:
            raise _damaged(file, ValueError("it has other columns"))
        paths, embeddings = rows.drop_null().columns
        kind = embeddings.type
        if paths.type != pa.string() or not (pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()):
            raise _damaged(file, ValueError(f"its columns are of {paths.type} and {kind}"))
        flat = embeddings.combine_chunks().flatten()
        vectors = flat.to_numpy(zero_copy_only=False).reshape(len(embeddings), kind.list_size)
        if not np.isfinite(vectors).all():
            raise _damaged(file, ValueError("some numbers are none"))
        if len(vectors):
            yield paths.to_pylist(), vectors


def _damaged(file: Path, error: Exception) -> TableError:
    reason = str(error).strip().partition("\n")[0]
    return TableError(
        f"{str(file)!r} is no file of a table, or it is damaged ({reason}); remove it, and --resume makes it again, or name "
        "another output."
    )


def read_checked(file: Path, expected: "pa.Schema", columns: list[str] | None = None) -> "pa.Table":
    """The rows of a file. All its checksums are compared."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            if not opened.schema_arrow.remove_metadata().equals(expected):
                raise ValueError("it has other columns")
            return opened.read(columns)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise _damaged(file, error) from error
