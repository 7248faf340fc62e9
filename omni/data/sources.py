"""Read the rows of a data set from a file of JSON or CSV, or from folders that are named by their answer.

The contents of the path tell the layout:

| contents                                | rows                                                                       |
|-----------------------------------------|----------------------------------------------------------------------------|
| folder with metadata.jsonl or .csv      | the "imagefolder" of `datasets`: `file_name` and a text in each row        |
| folder of folders of files              | one per file, sorted by path (2 before 10); the folder's name is the answer|
| .jsonl, or a .json of the same content  | an object per line                                                         |
| .json                                   | a list of objects, such as `{"image": "a.png", "caption": "a wren"}`       |
| .csv                                    | columns of the same names                                                  |
| .parquet, .tar, a folder or a pattern   | see `omni.data.shards`                                                     |
| of them, a folder of `save_to_disk`     |                                                                            |

A source keeps where its rows begin, and reads a row on access; of a .json list it keeps the rows. A row that
cannot be parsed raises on access. A file that cannot be split into rows raises at once.
"""

import csv
import hashlib
import io
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from omni.items import suffixes

METADATA = ("metadata.jsonl", "metadata.csv")
RowProblem = Literal["malformed row", "no picture", "no answer"]


class Held(NamedTuple):
    """A file that stands in the row itself.

    Attributes:
        data: its bytes.
        name: what it is called there, or "".
    """

    data: bytes
    name: str


class ManifestError(ValueError):
    """A manifest or a row of it cannot be used. The message is one sentence: where, what is wrong, what to do."""

    def __init__(self, message: str, kind: RowProblem = "malformed row") -> None:
        super().__init__(message)
        self.kind = kind


class Source(Protocol):
    """The rows of a file or folder, not yet interpreted.

    Attributes:
        by_class: whether each row is a file in a folder that is named by its answer.
        blocks: how many rows are read together, block after block; None where each is read alone.
    """

    by_class: bool
    blocks: Sequence[int] | None

    def __len__(self) -> int: ...

    def place(self, index: int) -> str:
        """The place of a row, for messages: a file and the line or entry, counted from 1."""

    def fields(self, index: int) -> dict[str, Any]:
        """The names and values of a row. Raises `ManifestError` without its place."""

    def digest(self) -> str:
        """SHA-256 of the file, or of the names of the files. No item is opened."""


_EXPECTED = "a folder of files or a .jsonl, .json, .csv, .parquet or .tar file"


def open_source(path: Path) -> Source:
    """The rows at a path.

    Raises:
        ManifestError: there is nothing, or another layout, or the file cannot be read.
    """
    try:
        if path.is_dir():
            found = [path / name for name in METADATA if (path / name).is_file()]
            if len(found) > 1:
                raise ManifestError(
                    f"{str(path)!r} holds {' and '.join(METADATA)}, expected one of them; remove the other."
                )
            return _open_file(found[0]) if found else _Classes(path)
        if path.is_file():
            return _open_file(path)
        found_there = path.exists()
    except OSError as error:
        raise ManifestError(
            f"{str(error.filename or path)!r} cannot be read ({error.strerror}); check the path and its permissions."
        ) from error
    if found_there:
        raise ManifestError(f"{str(path)!r} is no regular file, expected {_EXPECTED}; check the path.")
    raise _missing(path)


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_address(name: str) -> bool:
    """Whether a name is an address, such as "https://example.org/a.png"."""
    return _ADDRESS.match(name) is not None


def expect_rows(path: str | Path) -> None:
    """Check that a path exists, or is a pattern or an address. Nothing is read.

    Raises:
        ManifestError: there is no such file or folder.
    """
    if not (os.path.exists(path) or has_magic(str(path)) or is_address(str(path))):
        raise _missing(Path(path))


def _missing(path: Path) -> ManifestError:
    where = "" if path.is_absolute() else f" in {os.getcwd()!r}"
    return ManifestError(f"{str(path)!r} does not exist{where}, expected {_EXPECTED}; check the path.")


def _open_file(path: Path) -> Source:
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv"):
        raise ManifestError(f"{str(path)!r} is of an unknown kind, expected {_EXPECTED}; convert it.")
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError(f"{str(path)!r} is text in UTF-16, expected UTF-8; save it as UTF-8.")
    if suffix == ".csv":
        return _CsvFile(path)
    # some programs write one object per line into .json files
    if suffix == ".json" and start.removeprefix(_BOM).lstrip().startswith(b"["):
        return _JsonList(path)
    return _JsonLines(path)


_BOM = b"\xef\xbb\xbf"


class _File:
    """The common part of the three kinds of files.

    Attributes:
        numbers: for each row, the line or entry where it begins, counted from 1.
        starts: for each row, and after the last one, the byte where it begins.
    """

    unit = "line"
    by_class = False
    blocks: Sequence[int] | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.numbers, self.starts = path, array("q"), array("q")
        with path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256").hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def place(self, index: int) -> str:
        return f"{self.path}, {self.unit} {self.numbers[index]}"

    def digest(self) -> str:
        return self._digest

    def _bytes(self, index: int) -> bytes:
        """The bytes of a row."""
        start, stop = self.starts[index], self.starts[index + 1]
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        except OSError as error:
            raise ManifestError(f"the file cannot be read any more ({error.strerror}); bring it back.") from error
        if len(data) != stop - start:
            raise ManifestError("the file is shorter than when it was opened; leave it as it is, and begin again.")
        return data


class _JsonLines(_File):
    """A JSON object in each line that is not blank."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            place = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            file.seek(place)
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self.starts.append(place)
                    self.numbers.append(number)
                place += len(line)
        self.starts.append(place)

    def fields(self, index: int) -> dict[str, Any]:
        return parse_object(self._bytes(index))


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that a line or a file holds.

    Raises:
        ManifestError: it holds something else. The message does not name its place.
    """
    try:
        text = data.decode().rstrip()  # and no blank lines after it
        return _object(json.loads(text, object_pairs_hook=_pairs))
    except UnicodeDecodeError as error:
        raise ManifestError(_not_utf8(data[error.start :])) from error
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"expected a JSON object, found {short(text)} ({error.msg} in column {error.colno}); correct it."
        ) from error
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:  # a number that is too long, a list that is too deep
        raise ManifestError(f"expected a JSON object, found {short(text)} ({error}); correct it.") from error


class _JsonList(_File):
    """A JSON list of objects."""

    unit = "entry"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            text = path.read_bytes().removeprefix(_BOM).decode()
            self.entries: list[Any] = json.loads(text, object_pairs_hook=_pairs)
        except UnicodeDecodeError as error:
            raise ManifestError(f"{path}: {_not_utf8(error.object[error.start :])}") from error
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"{path}, line {error.lineno}: expected a list of objects in JSON, found a mistake in column "
                f"{error.colno} ({error.msg}); correct it."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ManifestError(
                f"{path}: expected a list of objects in JSON, found a mistake ({error}); correct it."
            ) from error
        self.numbers = array("q", range(1, len(self.entries) + 1))

    def fields(self, index: int) -> dict[str, Any]:
        return _object(self.entries[index])


class _Repeated(list[str]):
    """Takes the place of a JSON object in which a name occurs more than once. `json` itself would keep the last value."""


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    names = [name for name, _ in pairs]
    return _Repeated(sorted({name for name in names if names.count(name) > 1}))


def _object(value: Any) -> dict[str, Any]:
    """Check that a value is an object in which each name occurs once, and return it."""
    if repeated := next(_find_repeated(value), None):
        raise ManifestError(f"{', '.join(map(repr, repeated))} occurs more than once in one object; keep one of them.")
    if not isinstance(value, dict):
        raise ManifestError(f"expected a JSON object, found {short(value)}; give its values names.")
    return value


def _find_repeated(value: Any) -> Iterator[_Repeated]:
    if isinstance(value, _Repeated):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _find_repeated(child)


class _CsvFile(_File):
    """A CSV table. Its first line names the columns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.columns: list[str] = []
        number, row, place = 1, list[str](), 0
        with path.open("rb") as file:
            place = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            file.seek(place)

            def lines() -> Iterator[str]:
                nonlocal place
                for line in _text(file):
                    place += len(line.encode(errors="surrogateescape"))
                    yield line

            reader, start = csv.reader(lines(), strict=True), place
            try:
                for row in reader:
                    if row and not self.columns:
                        self._name_columns(row, number)
                    elif row:
                        self.starts.append(start)
                        self.numbers.append(number)
                    number, start = reader.line_num + 1, place
            except csv.Error as error:
                raise ManifestError(
                    f"{path}, line {number}: expected cells of CSV, found a mistake ({error}); put cells of several lines "
                    "into double quotes, and longer ones into a .jsonl file."
                ) from error
        self.starts.append(place)

    def _name_columns(self, columns: list[str], number: int) -> None:
        if len(columns) == 1 and (other := re.search(r"[;\t|]", columns[0])):
            raise ManifestError(
                f"{self.path}, line {number}: expected commas between the names of columns, found {other[0]!r}; save "
                "the table with commas."
            )
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise ManifestError(
                f"{self.path}, line {number}: columns should have different names, found {', '.join(map(repr, twice))} "
                "more than once; rename them."
            )
        self.columns = columns

    def fields(self, index: int) -> dict[str, Any]:
        cells = next(csv.reader(_text(io.BytesIO(self._bytes(index))), strict=True))
        for cell in cells:
            if (lost := cell.encode(errors="surrogateescape")) != cell.encode(errors="replace"):
                raise ManifestError(_not_utf8(lost))
        if len(cells) != len(self.columns):
            raise ManifestError(
                f"expected {len(self.columns)} cells ({', '.join(self.columns)}), found {len(cells)}: "
                f"{short(', '.join(cells))}; correct it."
            )
        return dict(zip(self.columns, cells, strict=True))


def _text(file: Any) -> io.TextIOWrapper:
    """Lines with their ends; bytes that are not UTF-8 become lone surrogates, which mark the row that has them."""
    return io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")


def _not_utf8(data: bytes) -> str:
    return f"expected text in UTF-8, found {data[:4]!r}; convert the file."


def short(value: Any) -> str:
    """A value, shortened for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Classes:
    """The files in the folders of a folder. The name of its folder is the answer of each."""

    by_class = True
    blocks: Sequence[int] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = _entries(path)
        folders = [entry for entry in entries if entry.is_dir()]
        inside = {folder: _entries(folder) for folder in folders}
        described = [folder for folder in folders if any((folder / name).is_file() for name in METADATA)]
        nested = [entry for folder in folders for entry in inside[folder] if entry.is_dir()]
        whole = folders and all(any(entry.is_dir() for entry in inside[folder]) for folder in folders)
        if described or whole or (folders and all(folder.name.lower() in _PARTS for folder in folders)):
            raise ManifestError(
                f"{str(path)!r} holds the parts of a data set, {_listed(described or folders)}; name one of these folders."
            )
        if nested:
            raise ManifestError(
                f"{str(nested[0].parent)!r} should hold the files of one class, found the folder {nested[0].name!r} in "
                "it; move its contents up or elsewhere."
            )
        if files := [entry for entry in entries if entry.suffix.lower() in (".jsonl", ".json", ".csv")]:
            raise ManifestError(
                f"{str(path)!r} holds {_listed(files)}, expected {' or '.join(METADATA)}, or only folders; name the file "
                "that describes the others, or move it elsewhere if none does."
            )
        if len(folders) < 2 or any(entry.suffix.lower() in suffixes() for entry in entries):
            raise ManifestError(
                f"{str(path)!r} should hold {' or '.join(METADATA)}, or a folder of files for each of several classes, "
                f"found {_listed(entries)}; write {METADATA[0]} with a JSON object in a line for each of them."
            )
        names = (f"{folder.name}/{file.name}" for folder in folders for file in inside[folder])
        self.names = sorted(names, key=_natural)

    def __len__(self) -> int:
        return len(self.names)

    def place(self, index: int) -> str:
        return str(self.path / self.names[index])

    def digest(self) -> str:
        return hashlib.sha256(b"\0".join(map(os.fsencode, self.names))).hexdigest()

    def fields(self, index: int) -> dict[str, Any]:
        return {"file_name": self.names[index], "text": self.names[index].split("/")[0]}


_PARTS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"})
"""A folder that holds only folders of these names holds the parts of a data set, not classes."""


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder, without hidden files and the files that operating systems leave there."""
    left = ("thumbs.db", "desktop.ini")
    return sorted(entry for entry in folder.iterdir() if not (entry.name.startswith(".") or entry.name.lower() in left))


def _listed(paths: Sequence[Path]) -> str:
    names = [repr(path.name) for path in paths[:3]]
    return ", ".join(names) + (f" and {len(paths) - 3:,} more" if len(paths) > 3 else "") if names else "nothing"


def _natural(name: str) -> list[list[int | str]]:
    """A sort key that puts 2 before 10, the same on every system."""
    return [[int(p) if p.isdigit() else p for p in re.split(r"([0-9]+)", part)] for part in name.split("/")]
