"""Write a table of embeddings so that it survives a kill.

Rows are computed in parts. A part is a file of its own with checksums, and it is there complete or not at all. A kill at
any moment loses only the parts that were being computed. A resumed run reads all parts, and names one that is damaged or
in a wrong place. For a table that is one file, the parts are in a folder beside it until the end.
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

from .columns import Shape, schema, written
from .table import KEY, TableError, describe, read_checked

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS, PART_BYTES = 1024, 16 << 20
"""Largest part of a table that is one file, in rows and bytes. One part is in memory at a time, and a kill loses it."""

FILE_ROWS, FILE_BYTES = 10_000, 128 << 20
"""The same for a table that is a folder, whose parts stay as its files."""

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """The rows [start, stop) of the table, in a file of their own."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"part-{self.number:05}.parquet"


def default_part_rows(shape: tuple[int, ...], batch_size: int, single: bool) -> int:
    """The default number of rows in a part, a multiple of `batch_size`; see `PART_ROWS` and `FILE_ROWS`."""
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
    # embeddings all differ, so a dictionary of them would save nothing
    return pq.ParquetWriter(file, described, use_dictionary=False, write_page_checksum=True)


class Output:
    """The place of a table: one file if the name ends with .parquet, otherwise a folder of part-00000.parquet and so on.

    Attributes:
        path: the file or folder.
        single: whether it is one file.
        folder: the folder of its parts.

    Raises:
        TableError: the place cannot be written to; or it exists and `resume` is false; or it holds something else.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        self.single = self.path.suffix.lower() == ".parquet"
        self.folder = self.path.with_name(f"{self.path.name}.parts") if self.single else self.path
        with _writing(self.path, "name another output"):
            self._look(resume)

    def _look(self, resume: bool) -> None:
        """Refuse a place that cannot take the table."""
        path = str(self.path)
        if not self.path.absolute().parent.is_dir():
            raise TableError(f"{path!r} cannot be written, because its folder does not exist; make it first.")
        if self.path.exists() and self.path.is_dir() == self.single:
            found, expected = (
                ("folder", "file") if self.single else ("file", "folder, or a name that ends with .parquet")
            )
            raise TableError(f"{path!r} is a {found}, expected a {expected}; name another output.")
        parts = sorted(self.folder.glob("part-*.parquet"))
        finished = self.path.exists() if self.single else bool(parts) and len(parts) == _number_of_parts(parts[0])
        if not resume and parts and not finished:
            raise TableError(f"{path!r} is unfinished; continue it with --resume, or name another output.")
        if self.path.exists() and (self.single or any(not each.name.startswith(".") for each in self.path.iterdir())):
            if not resume:
                raise TableError(f"{path!r} exists already and is not replaced; remove it, or name another output.")
            describe(self.path)

    @contextmanager
    def open(self, document: Document, paths: Sequence[str], shape: Shape, sized: bool = True) -> Iterator["Table"]:
        """Begin the table, or continue it; see `Table`.

        Raises:
            TableError: the table was begun with another document; another process is writing it; or it cannot be written.
        """
        if self.single and self.path.exists():
            yield Table(self, document, paths, shape, sized, finished=True)
            with _writing(self.path):
                shutil.rmtree(self.folder, ignore_errors=True)  # a kill after the joining leaves it
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
            table = Table(self, document, paths, shape, sized)
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
        output: its place.
        document: what its rows depend on. It has `rows`, the number of rows, and `shard_rows`, the number in each part. If
            the table was begun before, the document from then is kept.
        paths: the file of each row.
        shape: shape of an embedding.
        sized: whether items have a width and a height.
        finished: whether all rows are there already.

    Raises:
        TableError: a part is damaged, or belongs to another table or to other files.
    """

    def __init__(
        self,
        output: Output,
        document: Document,
        paths: Sequence[str],
        shape: Shape,
        sized: bool = True,
        finished: bool = False,
    ) -> None:
        self.output, self.document, self.schema, self.finished = output, document, schema(shape, sized), finished
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
                    "the right one."
                )
            if read_checked(file, self.schema)["path"].to_pylist() != [written(name) for name in names]:
                raise TableError(
                    f"{str(file)!r} holds the rows of other files than belong there; move it elsewhere, and --resume "
                    "makes the right one."
                )

    def missing(self) -> list[Part]:
        """The parts that are not computed yet, in order."""
        return [part for part in self.parts if not self.finished and not self._file(part).exists()]

    def add(self, part: Part, data: bytes) -> None:
        """Write a part that `encode_part` made. Parts may come in any order.

        Raises:
            TableError: it cannot be written.
        """
        with _writing(self.output.path):
            write_whole(self._file(part), lambda file: file.write(data))

    def unreadable(self) -> int:
        """The number of rows with an error."""
        files = [self.output.path] if self.finished else map(self._file, self.parts)
        errors = [read_checked(file, self.schema, ["error"])["error"] for file in files]
        return sum(len(column) - column.null_count for column in errors)

    def join(self, file: BinaryIO) -> None:
        """Write all parts into one file."""
        with _writer(file, self.schema, self.document) as writer:
            for part in self.parts:
                rows = read_checked(self._file(part), self.schema)
                writer.write_table(rows, row_group_size=len(rows))

    def _file(self, part: Part) -> Path:
        return self.output.folder / part.name


def _agree(path: Path, then: Document, now: Document) -> None:
    """Refuse to continue a table if something that its rows depend on differs from when it was begun."""
    name = _difference(then, now)
    if name == "files_sha256":
        raise TableError(
            f"{str(path)!r} was begun with other files than those found now, or some were changed since; restore those "
            "files, or name another output."
        )
    if name is not None:
        raise TableError(
            f"{str(path)!r} was begun with {name} {then.get(name)!r}, found {now[name]!r} now, and one table cannot have "
            "rows of both; continue it as it was begun, or name another output."
        )


def _difference(then: Document, now: Document) -> str | None:
    """The first difference in what the rows of two tables depend on. The checkpoint's path and the error do not count."""
    return next((name for name in now if name not in ("checkpoint", "error") and then.get(name) != now[name]), None)


@contextmanager
def _writing(path: Path, remedy: str = "make room or change its permissions, then use --resume") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TableError(f"{str(path)!r} cannot be written: the system says {reason!r}; {remedy}.") from error
