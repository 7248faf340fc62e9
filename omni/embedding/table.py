"""The table of embeddings: its columns, its files, and how it comes through a kill.

| column    | type                              | is                                                                     |
|-----------|-----------------------------------|------------------------------------------------------------------------|
| path      | string                            | the file, as it was found; a byte of its name that is no text is       |
|           |                                   | written as \\udcff and the like, and a backslash therefore as two        |
| width     | int32                             | of the whole picture, upright; null if it cannot be read               |
| height    | int32                             |                                                                        |
| error     | string                            | why there is no embedding, in a sentence; null if there is one         |
| embedding | fixed_size_list<float>[D]         | its CLS token; null if there is an error                               |
|           | fixed_size_list<..[D]>[n]         | or its n tokens of a grid, or those that a Thinker gets                |

What the rows rest on is one JSON document in the schema's metadata, under the key `omni`; `describe` reads it.

Rows are computed in pieces of a few seconds' work. A piece is a file of its own in the folder `unfinished`, and is either
there and whole or not there: it is written under another name first. When all pieces of a Parquet file are there, they are
joined to it. What is killed at any moment has lost the pieces that were being computed, and nothing else; whatever is left
to do is read from the names of the files.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"omni"

PIECE_ROWS, PIECE_BYTES = 1024, 16 << 20
"""A piece has as many rows as both allow: so much is in memory at once, and so much may a kill cost."""

GROUP_BYTES = 8 << 20
"""Row groups of a Parquet file have as many pieces as this allows, and one at least."""

SHARD_ROWS, SHARD_BYTES = 100_000, 1 << 30
"""A Parquet file of a folder has as many rows as both allow."""

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
        {"path": pa.string(), "width": pa.int32(), "height": pa.int32(), "error": pa.string(), "embedding": embedding}
    )


def record_batch(
    paths: Sequence[str],
    sizes: Sequence[tuple[int, int] | None],
    errors: Sequence[str | None],
    embeddings: Any,
) -> "pa.RecordBatch":
    """Rows from a path, a (width, height) or None, an error or None, and one of float32[B, *shape] each."""
    import pyarrow as pa

    shape = embeddings.shape[1:]
    missing = pa.array([error is not None for error in errors])
    values: pa.Array = pa.array(embeddings.reshape(-1))
    for axis in reversed(range(len(shape))):
        values = pa.FixedSizeListArray.from_arrays(values, shape[axis], mask=None if axis else missing)
    return pa.record_batch(
        [
            pa.array([_text(path.replace("\\", r"\\")) for path in paths], pa.string()),
            pa.array([size[0] if size else None for size in sizes], pa.int32()),
            pa.array([size[1] if size else None for size in sizes], pa.int32()),
            pa.array([_text(error) if error else None for error in errors], pa.string()),
            values,
        ],
        schema=schema(shape),
    )


def _text(name: str) -> str:
    """Names of files need not be text; bytes that are none become \\udcff and the like."""
    return name.encode(errors="backslashreplace").decode()


def pack(batches: Sequence["pa.RecordBatch"]) -> bytes:
    """The content of a piece's file (Arrow's IPC format)."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write(batch)
    return sink.getvalue().to_pybytes()


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


def default_shard_rows(shape: tuple[int, ...]) -> int:
    """How many rows each file of a folder has, unless somebody says it."""
    return max(1, min(SHARD_ROWS, SHARD_BYTES // (4 * math.prod(shape))))


@dataclass(frozen=True)
class Piece:
    """The rows [start, stop) of the table, all of them in the Parquet file number `shard`."""

    shard: int
    start: int
    stop: int


class Output:
    """Where a table goes: one file if the name ends with .parquet, otherwise a folder of part-00000.parquet and so on.

    Attributes:
        path: as it was given.
        single: whether it is one file.
        unfinished: the folder of pieces, which is there only as long as the table is not complete.

    Raises:
        TableError: a name that cannot be written to; without `resume` one that exists, with it one of something else.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        self.single = self.path.suffix.lower() == ".parquet"
        self.unfinished = (
            self.path.with_name(f"{self.path.name}.unfinished") if self.single else self.path / "unfinished"
        )
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
        if not resume and self.unfinished.exists():
            raise TableError(f"{path!r} is unfinished; --resume goes on with it, or name another output.")
        if self.path.exists() and not self.unfinished.exists() and (self.single or any(self.path.iterdir())):
            if not resume:
                raise TableError(f"{path!r} exists already and is not replaced; remove it, or name another output.")
            describe(self.path)

    def part(self, shard: int) -> Path:
        """The Parquet file of a shard."""
        return self.path if self.single else self.path / f"part-{shard:05}.parquet"

    @contextmanager
    def open(self, document: Document, shape: tuple[int, ...], batch_size: int) -> Iterator["Table"]:
        """Begin the table, or go on with it; see `Table`.

        Raises:
            TableError: it was begun with another document; another process writes it; nothing can be written.
        """
        with _writing(self.path):
            if not self.unfinished.exists() and self._has_parts():
                self._agree(document)  # or a table that is finished would not be any more
            self.unfinished.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.unfinished / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise TableError(
                    f"{str(self.path)!r} is being written by another process; wait for its end."
                ) from error
        try:
            with _writing(self.path):
                table = Table(self, self._agree(document), shape, batch_size)
            yield table
            assert not table.missing(), "a table is closed before all of its pieces are there"
        finally:
            lock.release()
        with _writing(self.path):
            shutil.rmtree(self.unfinished)

    def _has_parts(self) -> bool:
        return self.path.exists() if self.single else any(self.path.glob("part-*.parquet"))

    def _agree(self, document: Document) -> Document:
        """What the rows rest on, as it was written when the table was begun."""
        note = self.unfinished / "table.json"
        if not note.exists() and not self._has_parts():
            _replace(note, lambda file: file.write(json.dumps(document).encode()))
        then = json.loads(note.read_bytes()) if note.exists() else describe(self.path)
        name = _difference(then, document)
        if name == "files_sha256":
            raise TableError(
                f"{str(self.path)!r} was begun with other files than those found now, or some were changed since; go on "
                "with those it was begun with, or name another output."
            )
        if name is not None:
            raise TableError(
                f"{str(self.path)!r} was begun with {name} {then.get(name)!r}, found {document[name]!r} now, and rows of "
                "both do not belong into one table; go on with what it was begun with, or name another output."
            )
        return dict(then)


def _difference(then: Document, now: Document) -> str | None:
    """What two tables rest on differently, if anything; where the weights lie does not matter, nor how sums are rounded."""
    return next((name for name in now if name not in ("checkpoint", "error") and then.get(name) != now[name]), None)


class Table:
    """A table that is being written, piece by piece.

    Args:
        output: its files.
        document: what its rows rest on, and among that `rows`, how many there are, and `shard_rows`, how many of them are
            in each Parquet file.
        shape: of an embedding, (D,) or (n, D).
        batch_size: a piece has a multiple of it.

    Raises:
        TableError: a finished Parquet file that is damaged, or of another table.
    """

    def __init__(self, output: Output, document: Document, shape: tuple[int, ...], batch_size: int) -> None:
        self.output, self.rows, self.shard_rows = output, document["rows"], document["shard_rows"]
        row_bytes = 4 * math.prod(shape)
        self.piece_rows = max(1, min(PIECE_ROWS, PIECE_BYTES // row_bytes) // batch_size) * batch_size
        self.group_pieces = max(1, GROUP_BYTES // (self.piece_rows * row_bytes))
        self.schema = schema(shape).with_metadata({KEY: json.dumps(document)})
        self.shards = range(-(-self.rows // self.shard_rows))
        self.waiting = {shard: sum(1 for _ in self._missing(shard)) for shard in self.shards}
        for shard in self.shards:
            if (part := output.part(shard)).exists() and (name := _difference(describe(part), document)):
                raise TableError(
                    f"{str(part)!r} is of another table, which has another {name}; move it elsewhere, and --resume "
                    "makes the one that belongs here."
                )
            if self.waiting[shard] == 0:  # killed before all was joined, or before the pieces were removed
                self._join(shard)

    def missing(self) -> list[Piece]:
        """The pieces that are still to be computed, in order."""
        return [piece for shard in self.shards for piece in self._missing(shard)]

    def add(self, piece: Piece, data: bytes) -> None:
        """Keep a piece, as `pack` makes it; pieces may come in any order.

        Raises:
            TableError: it cannot be written.
        """
        with _writing(self.output.path):
            _replace(self._file(piece), lambda file: file.write(data))
            self.waiting[piece.shard] -= 1
            if self.waiting[piece.shard] == 0:
                self._join(piece.shard)

    def unreadable(self) -> int:
        """How many rows of the finished files have an error."""
        import pyarrow.parquet as pq

        total, column = 0, self.schema.get_field_index("error")
        for shard in self.shards:
            found = pq.read_metadata(self.output.part(shard))
            groups = [found.row_group(group) for group in range(found.num_row_groups)]
            total += sum(group.num_rows - group.column(column).statistics.null_count for group in groups)
        return total

    def _missing(self, shard: int) -> Iterator[Piece]:
        if not self.output.part(shard).exists():
            yield from (piece for piece in self._pieces(shard) if not self._file(piece).exists())

    def _pieces(self, shard: int) -> list[Piece]:
        stop = min((shard + 1) * self.shard_rows, self.rows)
        starts = range(shard * self.shard_rows, stop, self.piece_rows)
        return [Piece(shard, start, min(start + self.piece_rows, stop)) for start in starts]

    def _file(self, piece: Piece) -> Path:
        return self.output.unfinished / f"{piece.start:012}.arrow"

    def _join(self, shard: int) -> None:
        """Make the Parquet file of pieces that are all there, if it is not there yet, and remove them."""
        pieces, part = self._pieces(shard), self.output.part(shard)
        if not part.exists():
            _replace(part, lambda file: self._write(file, pieces), inside=self.output.unfinished)
        for piece in pieces:
            self._file(piece).unlink(missing_ok=True)

    def _write(self, file: BinaryIO, pieces: list[Piece]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with pq.ParquetWriter(file, self.schema, use_dictionary=False) as writer:  # no two embeddings are the same
            for first in range(0, len(pieces), self.group_pieces):
                files = [str(self._file(piece)) for piece in pieces[first : first + self.group_pieces]]
                group = pa.concat_tables([pa.ipc.open_file(pa.memory_map(file)).read_all() for file in files])
                writer.write_table(group, row_group_size=len(group))


def _replace(path: Path, write: Callable[[BinaryIO], Any], inside: Path | None = None) -> None:
    """Write a file that is there whole or not at all, also when the power fails; until then it is `inside` a folder."""
    temporary = (inside or path.parent) / f"{path.name}.writing"
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def _writing(path: Path, remedy: str = "make room or change its permissions, then --resume goes on") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TableError(f"{str(path)!r} cannot be written: the system says {reason!r}; {remedy}.") from error
