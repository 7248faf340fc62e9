"""Rows of a file of JSON or CSV.

A file keeps where its rows begin, and reads a row on access; of a .json list it keeps the rows.
"""

import csv
import hashlib
import io
import json
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni.data.sources import ManifestError, Source, short


def open_text(path: Path) -> Source:
    """The rows of a .jsonl, .json or .csv file."""
    suffix = path.suffix.lower()
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


class _File(Source):
    """The common part of the three kinds of files.

    Attributes:
        numbers: for each row, the line or entry where it begins, counted from 1.
        starts: for each row, and after the last one, the byte where it begins.
    """

    unit = "line"

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
