"""Rows of Parquet files, and of a data set that `datasets` saved to disk.

A row without another text has the name of its class as the answer. Memory holds only the beginnings of rows, and the last
blocks that were read.
"""

import hashlib
import json
import os
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.data.sources import SAYINGS, ManifestError, Source
from omni.registry import modalities

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 4
"""The number of blocks of rows in memory. Their rows may be read in any order."""

MOST_BYTES = 2**30
"""Largest block of rows."""

AT_ONCE = 2**26
"""The number of bytes of a block that are unpacked before its size is checked again."""


class Parquet(Source):
    """Rows of Parquet files; a row group is read at once, and the last `WINDOW` of them are kept."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.files, digest = files, hashlib.sha256()
        self._groups = list[tuple[int, int]]()  # file, and row group in it
        firsts, schema = list[int](), None
        blocks = array("q")
        for number, file in enumerate(files):
            try:
                with pq.ParquetFile(file) as opened:
                    metadata, found = opened.metadata, opened.schema_arrow
            except (pa.ArrowException, OSError) as error:
                reason = str(error).partition("\n")[0].rstrip(".")
                raise ManifestError(f"{str(file)!r} is no whole Parquet file ({reason}); get it again.") from error
            if schema is not None and set(found.names) != set(schema.names):
                other = ", ".join(sorted(set(found.names) ^ set(schema.names)))
                raise ManifestError(
                    f"{str(file)!r} has other columns than {str(files[0])!r} ({other}); read them one by one."
                )
            schema = schema or found
            firsts.append(sum(blocks))
            for group in range(metadata.num_row_groups):
                about = metadata.row_group(group)
                if about.total_byte_size > MOST_BYTES:
                    raise ManifestError(
                        f"{str(file)!r} has a row group of {about.total_byte_size:,} bytes, expected at most "
                        f"{MOST_BYTES:,}; write it again with row_group_size=100."
                    )
                blocks.append(about.num_rows)
                self._groups.append((number, group))
            digest.update(f"{file.name} {os.path.getsize(file)}\n".encode(errors="surrogateescape"))
            digest.update(_footer(file))
        self.blocks, self._firsts, self._digest = blocks, firsts, digest.hexdigest()
        self._ends = array("q", accumulate(blocks))
        self._tidy = _Features(schema).tidy
        self._read: OrderedDict[int, pa.Table] = OrderedDict()
        self._refused: dict[int, str] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> str:
        """See `Source`."""
        number, _ = self._groups[bisect_right(self._ends, index)]
        return f"{self.files[number]}, row {index - self._firsts[number] + 1}"

    def fields(self, index: int) -> dict[str, Any]:
        """See `Source`."""
        block = bisect_right(self._ends, index)
        table = self._table(block)
        return self._tidy(_values(table.slice(index - (self._ends[block] - self.blocks[block]), 1)))  # type: ignore[index]

    def digest(self) -> str:
        """See `Source`."""
        return self._digest

    def _table(self, block: int) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        if block in self._read:
            self._read.move_to_end(block)
            return self._read[block]
        if block in self._refused:
            raise ManifestError(self._refused[block])
        number, group = self._groups[block]
        try:
            with pq.ParquetFile(self.files[number], memory_map=True, page_checksum_verification=True) as file:
                table = _unpacked(file, group)
        except (pa.ArrowException, OSError, MemoryError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            self._refused[block] = f"its row group {group} cannot be read ({reason}); get the file again."
            raise ManifestError(self._refused[block]) from error
        if table is None:
            self._refused[block] = (
                f"its row group {group} has more than {MOST_BYTES:,} bytes once it is unpacked; write the file again with "
                "row_group_size=100."
            )
            raise ManifestError(self._refused[block])
        self._read[block] = table
        while len(self._read) > WINDOW:
            self._read.popitem(last=False)
        return table

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_read": OrderedDict()}


def _unpacked(file: Any, group: int) -> "pa.Table | None":
    """The rows of a row group; None if they are too large. A value that occurs often is stored once, and read often."""
    import pyarrow as pa

    stored, batches, held = file.metadata.row_group(group).total_byte_size, list[Any](), 0
    for batch in file.iter_batches(max(1, min(AT_ONCE // max(1, stored), 10_000)), row_groups=[group]):
        batches.append(batch)
        if (held := held + batch.nbytes) > MOST_BYTES:
            return None
    return pa.Table.from_batches(batches, file.schema_arrow)


def _footer(file: Path) -> bytes:
    """The metadata of a Parquet file: lengths, places and statistics of all columns."""
    with file.open("rb") as opened:
        opened.seek(-8, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - length, os.SEEK_END)
        return opened.read(length)


class Saved(Source):
    """Rows of a data set that `datasets` saved to disk. Its files are mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path, digest = path, hashlib.sha256()
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise ManifestError(
                f'{str(path)!r} was saved by `datasets`, which is not installed; pip install "omni-thinker[train]".'
            ) from error
        try:
            found: Any = load_from_disk(str(path))
        except Exception as error:  # `datasets` has many
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ManifestError(
                f"{str(path)!r} cannot be read as a saved data set ({reason}); save it again."
            ) from error
        self._rows = found.with_format("arrow")
        for name in ("state.json", "dataset_info.json"):
            digest.update((path / name).read_bytes())
        self._digest = digest.hexdigest()
        self._tidy = _Features(found.features.arrow_schema).tidy

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        """See `Source`."""
        return f"{self.path}, row {index + 1}"

    def fields(self, index: int) -> dict[str, Any]:
        """See `Source`."""
        return self._tidy(_values(self._rows[index : index + 1]))

    def digest(self) -> str:
        """See `Source`."""
        return self._digest


def _values(row: "pa.Table") -> dict[str, Any]:
    """The names and values of a row."""
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except (ValueError, OverflowError, LookupError) as error:  # text that is not UTF-8, times beyond all years
        raise ManifestError(f"it holds a value that is not valid ({error}); write the file again.") from error
    return values


class _Features:
    """The notes of `datasets` in a schema: which columns are items, and the names of classes."""

    def __init__(self, schema: "pa.Schema | None") -> None:
        noted = ((schema.metadata if schema is not None else None) or {}).get(b"huggingface")
        try:
            features = json.loads(noted)["info"]["features"] if noted else {}
        except (ValueError, KeyError, TypeError, RecursionError):
            features = {}
        self.classes: dict[str, list[str]] = {}
        self.items: dict[str, str] = {}
        for name, feature in features.items() if isinstance(features, dict) else ():
            kind = feature.get("_type") if isinstance(feature, dict) else None
            names = feature.get("names") if kind == "ClassLabel" else None
            if isinstance(names, list) and names and all(isinstance(each, str) for each in names):
                self.classes[name] = names
            elif isinstance(kind, str):
                self.items[name] = kind.lower()

    def tidy(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row as a line of JSON would have it: items under the names of their modalities, classes by their names."""
        known = modalities()
        for name, kind in self.items.items():  # such as the column `img` of pictures
            if kind in known and name not in (kind, f"{kind}s") and kind not in row and name in row:
                row = {(kind if key == name else key): value for key, value in row.items()}
        if self.classes and not any(row.get(key) is not None for key in (*SAYINGS, "answer")):
            for name, names in self.classes.items():
                label = row.get(name)
                inside = isinstance(label, int) and 0 <= label < len(names)
                return {**row, "text": names[label] if inside else None}  # type: ignore[index]
        return row
