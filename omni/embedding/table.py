"""The table of embeddings: its columns, its files, and how it comes through a kill.

| column    | type                              | is                                                                     |
|-----------|-----------------------------------|------------------------------------------------------------------------|
| path      | string                            | the file, as it was found; a byte of its name that is no text is       |
|           |                                   | written as \\udcff and the like, and a backslash therefore as two        |
| width     | int32                             | of the whole picture, upright; null if it cannot be read               |
| height    | int32                             |                                                                        |
| error     | string                            | why there is no embedding, in a sentence; null if there is one         |
| note      | string                            | what the decoder disliked in a file that lost nothing; null if nothing |
| embedding | fixed_size_list<float>[D]         | its CLS token; null if there is an error                               |
|           | fixed_size_list<..[D]>[n]         | or its n tokens of a grid, or those that a Thinker gets                |

What the rows rest on is one JSON document in the schema's metadata, under the key `omni`; `describe` reads it.

Rows are computed in parts. A part is a file of its own, with checksums, and is either there and whole or not there. What is
killed at any moment has lost the parts that were being computed, and nothing else. Going on looks at the files: a part that
is damaged, or stands in the place of another, is refused by name. A table that is to be one file has its parts in a folder
beside it, and is joined at the end.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

from omni.files import write_whole

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"omni"

PART_ROWS, PART_BYTES = 1024, 16 << 20
"""The parts of one file have as many rows as both allow: so much is in memory at once, and so much may a kill cost."""

FILE_ROWS, FILE_BYTES = 10_000, 128 << 20
"""The same for the files of a folder, which stay."""

Document = Mapping[str, Any]


class TableError(ValueError):
    """An output that cannot be written or gone on with. The message is one sentence: what was found, what to do."""


# --- Columns ----------------------------------------------------------------------------------------------------------


def schema(shape: tuple[int, ...]) -> "pa.Schema":
    """The columns for embeddings float32[*shape]: (D,), or (n, D)."""
    import pyarrow as pa

    embedding = pa.float32()
    for size in reversed(shape):
        embedding = pa.list_(embedding, size)
    return pa.schema(
        {
            "path": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "error": pa.string(),
            "note": pa.string(),
            "embedding": embedding,
        }
    )


def record_batch(
    paths: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    errors: Sequence[str | None],
    notes: Sequence[str | None],
    embeddings: Any,
) -> "pa.RecordBatch":
    """Rows from a path, a (width, height) or None, an error or None, a note or None, and one of float32[B, *shape] each."""
    import pyarrow as pa

    shape = embeddings.shape[1:]
    missing = pa.array([error is not None for error in errors])
    values: pa.Array = pa.array(embeddings.reshape(-1))
    for axis in reversed(range(len(shape))):
        values = pa.FixedSizeListArray.from_arrays(values, shape[axis], mask=None if axis else missing)
    return pa.record_batch(
        [
            pa.array([_written(path) for path in paths], pa.string()),
            pa.array([size[0] if size else None for size in sizes], pa.int32()),
            pa.array([size[1] if size else None for size in sizes], pa.int32()),
            pa.array([_text(error) if error else None for error in errors], pa.string()),
            pa.array([_text(note) if note else None for note in notes], pa.string()),
            values,
        ],
        schema=schema(shape),
    )


def _written(path: str) -> str:
    """A path as it stands in the table."""
    return _text(path.replace("\\", r"\\"))


def _text(name: str) -> str:
    """Names of files need not be text; bytes that are none become \\udcff and the like."""
    return name.encode(errors="backslashreplace").decode()


def describe(path: str | Path) -> dict[str, Any]:
    """What the rows of a Parquet file, or of a folder of such files, rest on.

    Raises:
        TableError: no table of `omni embed`, or a damaged one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = Path(path)
    if file.is_dir():
        parts = sorted(file.glob("part-*.parquet"))
        if not parts:
            raise TableError(f"{str(path)!r} is not a table that `omni embed` wrote; name another output.")
        file = parts[0]
    try:
        return dict(json.loads(pq.read_schema(file).metadata[KEY]))
    except PermissionError as error:
        raise TableError(f"{str(file)!r} may not be read by this user; change its permissions.") from error
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise TableError(
            f"{str(file)!r} is not a table that `omni embed` wrote, or no longer a whole one; remove it, and --resume makes "
            "it again, or name another output."
        ) from error


# --- Files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The rows [start, stop) of the table, in a file of their own."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"part-{self.number:05}.parquet"


def default_part_rows(shape: tuple[int, ...], batch_size: int, single: bool) -> int:
    """How many rows a part has unless somebody says it, a multiple of `batch_size`; see `PART_ROWS` and `FILE_ROWS`."""
    most, size = (PART_ROWS, PART_BYTES) if single else (FILE_ROWS, FILE_BYTES)
    return max(1, min(most, size // (4 * math.prod(shape))) // batch_size) * batch_size


def encode_part(batches: Sequence["pa.RecordBatch"], document: Document) -> bytes:
    """The content of a part's file."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    rows = pa.Table.from_batches(batches)
    with _writer(sink, rows.schema, document) as writer:
        writer.write_table(rows, row_group_size=len(rows))
    return sink.getvalue().to_pybytes()


def _writer(file: Any, schema: "pa.Schema", document: Document) -> Any:
    import pyarrow.parquet as pq

    described = schema.with_metadata({KEY: json.dumps(document)})
    # no two embeddings are the same, so a dictionary of them saves nothing
    return pq.ParquetWriter(file, described, use_dictionary=False, write_page_checksum=True)


class Output:
    """Where a table goes: one file if the name ends with .parquet, otherwise a folder of part-00000.parquet and so on.

    Attributes:
        path: as it was given.
        single: whether it is one file.
        folder: where its parts are.

    Raises:
        TableError: a name that cannot be written to; without `resume` one that exists, with it one of something else.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        self.single = self.path.suffix.lower() == ".parquet"
        self.folder = self.path.with_name(f"{self.path.name}.parts") if self.single else self.path
        with _writing(self.path, "name another output"):
            self._look(resume)

    def _look(self, resume: bool) -> None:
        """Whether what is there allows to write."""
        path = str(self.path)
        if not self.path.absolute().parent.is_dir():
            raise TableError(f"{path!r} cannot be written, as its folder does not exist; make it first.")
        if self.path.exists() and self.path.is_dir() == self.single:
            found, expected = (
                ("folder", "file") if self.single else ("file", "folder, or a name that ends with .parquet")
            )
            raise TableError(f"{path!r} is a {found}, expected a {expected}; name another output.")
        parts = sorted(self.folder.glob("part-*.parquet"))
        finished = self.path.exists() if self.single else bool(parts) and len(parts) == _number_of_parts(parts[0])
        if not resume and parts and not finished:
            raise TableError(f"{path!r} is unfinished; --resume goes on with it, or name another output.")
        if self.path.exists() and (self.single or any(not each.name.startswith(".") for each in self.path.iterdir())):
            if not resume:
                raise TableError(f"{path!r} exists already and is not replaced; remove it, or name another output.")
            describe(self.path)

    @contextmanager
    def open(self, document: Document, paths: Sequence[str], shape: tuple[int, ...]) -> Iterator["Table"]:
        """Begin the table, or go on with it; see `Table`.

        Raises:
            TableError: it was begun with another document; another process writes it; nothing can be written.
        """
        if self.single and self.path.exists():
            yield Table(self, document, paths, shape, finished=True)
            with _writing(self.path):
                shutil.rmtree(self.folder, ignore_errors=True)  # left by a kill after the last part was joined
            return
        with _writing(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise TableError(
                    f"{str(self.path)!r} is being written by another process; wait for its end."
                ) from error
        try:
            table = Table(self, document, paths, shape)
            yield table
            assert not table.missing(), "a table is closed before all of its parts are there"
            with _writing(self.path):
                if self.single:
                    write_whole(self.path, table.join)
                    shutil.rmtree(self.folder)
        finally:
            lock.release()
            with suppress(OSError):
                (self.folder / ".lock").unlink(missing_ok=True)


def _number_of_parts(part: Path) -> int:
    document = describe(part)
    return -(-int(document["rows"]) // int(document["shard_rows"]))


class Table:
    """A table that is being written, part by part.

    Args:
        output: its files.
        document: what its rows rest on, as it was written when the table was begun. Among that is `rows`, how many there
            are, and `shard_rows`, how many of them are in each part.
        paths: the file of each row.
        shape: of an embedding, (D,) or (n, D).
        finished: whether all rows are there already.

    Raises:
        TableError: a part that is damaged, of another table, or of other files.
    """

    def __init__(
        self, output: Output, document: Document, paths: Sequence[str], shape: tuple[int, ...], finished: bool = False
    ) -> None:
        self.output, self.document, self.schema, self.finished = output, document, schema(shape), finished
        rows, size = document["rows"], document["shard_rows"]
        self.parts = [Part(n, start, min(start + size, rows)) for n, start in enumerate(range(0, rows, size))]
        if finished:
            found = {output.path: paths}
        else:
            files = {self._file(part): paths[part.start : part.stop] for part in self.parts}
            found = {file: names for file, names in files.items() if file.exists()}
        for place, (file, names) in enumerate(found.items()):
            then = describe(file)
            if place == 0:
                _agree(output.path, then, document)
                self.document = then
            elif name := _difference(then, self.document):
                raise TableError(
                    f"{str(file)!r} is of another table, which has another {name}; move it elsewhere, and --resume makes "
                    "the one that belongs here."
                )
            if _read(file, self.schema)["path"].to_pylist() != [_written(name) for name in names]:
                raise TableError(
                    f"{str(file)!r} holds the rows of other files than belong there; move it elsewhere, and --resume "
                    "makes the one that belongs here."
                )

    def missing(self) -> list[Part]:
        """The parts that are still to be computed, in order."""
        return [part for part in self.parts if not self.finished and not self._file(part).exists()]

    def add(self, part: Part, data: bytes) -> None:
        """Keep a part, as `encode_part` makes it; parts may come in any order.

        Raises:
            TableError: it cannot be written.
        """
        with _writing(self.output.path):
            write_whole(self._file(part), lambda file: file.write(data))

    def unreadable(self) -> int:
        """How many rows have an error."""
        files = [self.output.path] if self.finished else map(self._file, self.parts)
        errors = [_read(file, self.schema, ["error"])["error"] for file in files]
        return sum(len(column) - column.null_count for column in errors)

    def join(self, file: BinaryIO) -> None:
        """Write all parts as one file."""
        with _writer(file, self.schema, self.document) as writer:
            for part in self.parts:
                rows = _read(self._file(part), self.schema)
                writer.write_table(rows, row_group_size=len(rows))

    def _file(self, part: Part) -> Path:
        return self.output.folder / part.name


def _agree(path: Path, then: Document, now: Document) -> None:
    """Whether a table may be gone on with: all that its rows rest on is what it was when the table was begun."""
    name = _difference(then, now)
    if name == "files_sha256":
        raise TableError(
            f"{str(path)!r} was begun with other files than those found now, or some were changed since; go on "
            "with those it was begun with, or name another output."
        )
    if name is not None:
        raise TableError(
            f"{str(path)!r} was begun with {name} {then.get(name)!r}, found {now[name]!r} now, and rows of "
            "both do not belong into one table; go on with what it was begun with, or name another output."
        )


def _read(file: Path, expected: "pa.Schema", columns: list[str] | None = None) -> "pa.Table":
    """The rows of a file, all checksums compared."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as opened:
            if not opened.schema_arrow.remove_metadata().equals(expected):
                raise ValueError("it has other columns")
            return opened.read(columns)
    except (ValueError, OSError, pa.ArrowException) as error:
        reason = str(error).strip().partition("\n")[0]
        raise TableError(
            f"{str(file)!r} is not a whole file of a table ({reason}); remove it, and --resume "
            "makes it again, or name another output."
        ) from error


def _difference(then: Document, now: Document) -> str | None:
    """What two tables rest on differently, if anything; where the weights lie does not matter, nor how sums are rounded."""
    return next((name for name in now if name not in ("checkpoint", "error") and then.get(name) != now[name]), None)


@contextmanager
def _writing(path: Path, remedy: str = "make room or change its permissions, then --resume goes on") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TableError(f"{str(path)!r} cannot be written: the system says {reason!r}; {remedy}.") from error
