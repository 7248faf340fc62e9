"""Read the rows of data sets that contain their items: Parquet, tar files of webdataset, `save_to_disk`.

| path                                          | rows                                                                   |
|-----------------------------------------------|------------------------------------------------------------------------|
| .parquet, a folder or a pattern of them       | columns as in JSON; an item is a struct of `bytes` and `path`, or bytes|
| .tar, a folder or a pattern of them           | webdataset: the files of a sample share a name up to the first dot;    |
|                                               | `.txt` is its caption, `.cls` its class, `.json` has columns as in JSON|
| a folder that `datasets` saved                | as Parquet                                                             |

Where no other text is the answer, the name of a class label is. Memory holds only where rows begin; a row is read on
access.
"""

import hashlib
import json
import mmap
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.data.sources import METADATA, Held, ManifestError, Source, parse_object
from omni.items import suffixes
from omni.registry import modalities

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 4
"""The number of blocks of rows in memory. Their rows may be read in any order."""

MOST_BYTES = 2**30
"""Largest block of rows."""

AT_ONCE = 2**26
"""So many bytes of a block are unpacked between two looks at how large it has become."""

SAYINGS = ("messages", "conversations", "question", "caption", "text", "answer")


def open_shards(path: Path) -> Source | None:
    """The rows at a path; None if it is none of these layouts.

    Raises:
        ManifestError: a file cannot be read.
    """
    try:
        if path.is_dir():
            if (path / "dataset_dict.json").is_file():
                inside = ", ".join(sorted(repr(each.name) for each in path.iterdir() if each.is_dir()))
                raise ManifestError(f"{str(path)!r} holds the parts {inside}; name one of these folders.")
            if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
                return _Saved(path)
            if any((path / name).is_file() for name in METADATA):
                return None
            names = (name for name in os.listdir(path) if name.lower().endswith(tuple(_KINDS)) and name[0] != ".")
            files = [path / name for name in sorted(names) if (path / name).is_file()]
            if len({each.suffix.lower() for each in files}) > 1:
                raise ManifestError(
                    f"{str(path)!r} holds files of several kinds; name those of one, such as '*.parquet'."
                )
            parts = sorted({found[0] for each in files if (found := _PART.match(each.name))})
            if len(parts) > 1:
                pattern = str(path / f"{parts[0]}*")
                raise ManifestError(
                    f"{str(path)!r} holds the files of {', '.join(parts)}; name those of one part by a pattern, such as "
                    f"{pattern!r}."
                )
        elif has_magic(str(path)) and not path.exists():
            files = [Path(each) for each in sorted(glob(str(path)))]
            if not files:
                raise ManifestError(f"{str(path)!r} matches no file; check the pattern.")
            if len({each.suffix.lower() for each in files}) > 1 or files[0].suffix.lower() not in _KINDS:
                raise ManifestError(f"{str(path)!r} should match .parquet or .tar files alone; make it narrower.")
        else:
            files = [path] if path.is_file() else []
        if files and files[0].name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            raise ManifestError(f"{str(files[0])!r} is compressed, expected a .tar file; unpack it.")
        if files and (kind := _KINDS.get(files[0].suffix.lower())):
            return kind(path, files)
    except OSError as error:
        name = str(error.filename or path)
        raise ManifestError(
            f"{name!r} cannot be read ({error.strerror or error}); check it and its permissions."
        ) from error
    return None


_PART = re.compile(r"(train|test|valid(ation)?|val|dev|eval)(?=[-_.])")
"""Files of a folder that begin with these words are parts of a data set."""


class _Shards:
    """Rows of several files, one after the other.

    Attributes:
        path: what the user named.
        files: the files, in the order of their names.
        blocks: see `Source`.
    """

    by_class = False
    blocks: Sequence[int] | None = None

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self.files = path, files
        self._digest = hashlib.sha256()

    def digest(self) -> str:
        return self._digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_digest": _Digest(self.digest())}


class _Digest:
    """A finished digest, which can be sent to another process."""

    def __init__(self, text: str) -> None:
        self.text = text

    def hexdigest(self) -> str:
        return self.text


# --- Parquet and Arrow ------------------------------------------------------------------------------------------------


class _Parquet(_Shards):
    """Rows of Parquet files; a row group is read at once, and the last `WINDOW` of them are kept."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(path, files)
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
            self._digest.update(f"{file.name} {os.path.getsize(file)}\n".encode(errors="surrogateescape"))
            self._digest.update(_footer(file))
        self.blocks, self._firsts = blocks, firsts
        self._ends = array("q", accumulate(blocks))
        self._tidy = _Features(schema).tidy
        self._read: OrderedDict[int, pa.Table] = OrderedDict()
        self._refused: dict[int, str] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> str:
        number, _ = self._groups[bisect_right(self._ends, index)]
        return f"{self.files[number]}, row {index - self._firsts[number] + 1}"

    def fields(self, index: int) -> dict[str, Any]:
        block = bisect_right(self._ends, index)
        table = self._table(block)
        return self._tidy(_values(table.slice(index - (self._ends[block] - self.blocks[block]), 1)))  # type: ignore[index]

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
        return {**super().__getstate__(), "_read": OrderedDict()}


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


class _Saved(_Shards):
    """Rows of a data set that `datasets` saved to disk. Its files are mapped into memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])
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
            self._digest.update((path / name).read_bytes())
        self._tidy = _Features(found.features.arrow_schema).tidy

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"

    def fields(self, index: int) -> dict[str, Any]:
        return self._tidy(_values(self._rows[index : index + 1]))


def _values(row: "pa.Table") -> dict[str, Any]:
    """The names and values of a row."""
    try:
        values: dict[str, Any] = row.to_pylist()[0]
    except (ValueError, OverflowError, LookupError) as error:  # text that is not UTF-8, times beyond all years
        raise ManifestError(f"it holds a value that is none ({error}); write the file again.") from error
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
        if self.classes and not any(row.get(key) is not None for key in SAYINGS):
            for name, names in self.classes.items():
                label = row.get(name)
                inside = isinstance(label, int) and 0 <= label < len(names)
                return {**row, "text": names[label] if inside else None}  # type: ignore[index]
        return row


# --- Tar files --------------------------------------------------------------------------------------------------------


class _Tars(_Shards):
    """Samples of webdataset. A file of a sample that stands alone in its tar file is read from there."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        super().__init__(path, files)
        self._starts, self._ends = array("q"), array("q")
        for file in files:
            starts = _samples(file)
            self._starts += starts
            self._ends.append(len(self._starts))
            self._digest.update(f"{file.name} {os.path.getsize(file)}\n".encode(errors="surrogateescape"))
            self._digest.update(starts.tobytes())

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        file = self._file(index)
        first = self._ends[file - 1] if file else 0
        return f"{self.files[file]}, sample {index - first + 1}"

    def fields(self, index: int) -> dict[str, Any]:
        path, held, first = self.files[self._file(index)], dict[str, Held](), ""
        try:
            with path.open("rb") as file:
                for name, info in _members(file, self._starts[index]):
                    key, kind = _parted(name)
                    if held and key != first:
                        break
                    first = key
                    if kind in held:
                        raise ManifestError(f"it has two files {kind!r}; keep one of them.")
                    file.seek(info.offset_data)
                    held[kind] = Held(file.read(info.size), os.path.basename(name))
        except (OSError, tarfile.TarError) as error:
            raise ManifestError(f"the tar file cannot be read there ({error}); get it again.") from error
        return _sample(held)

    def _file(self, index: int) -> int:
        return bisect_right(self._ends, index)


def _sample(held: dict[str, Held]) -> dict[str, Any]:
    """The fields of a row from the files of a sample, by what follows the first dot of their names."""
    fields: dict[str, Any] = {}
    if (about := held.pop("json", None)) is not None:
        try:
            fields |= parse_object(about.data)
        except ManifestError as error:
            raise ManifestError(f"{about.name!r}: {error}") from error
    said = held.pop("txt", None) or held.pop("cls", None)
    if said is not None:
        try:
            text = said.data.decode().strip()
        except UnicodeDecodeError as error:
            raise ManifestError(f"{said.name!r} is no text in UTF-8 ({error.reason}); convert it.") from error
        fields = {key: value for key, value in fields.items() if key not in SAYINGS} | {"text": text}
    known = suffixes()
    members = {each.name: each for each in held.values() if each.name.lower().endswith(known)}
    named = [key for key, value in fields.items() if isinstance(value, str) and value in members]
    for key in named:  # the JSON says which item this file is
        fields[key] = members.pop(fields[key])
    return {**fields, "file_names": list(members.values())} if members else fields


def _parted(name: str) -> tuple[str, str]:
    """The key of a sample and the kind of its file: `a/001.seg.png` -> `a/001`, `seg.png`."""
    folder, _, base = name.rpartition("/")
    key, _, kind = base.partition(".")
    return f"{folder}/{key}", kind.lower()


def _samples(path: Path) -> array:  # type: ignore[type-arg]
    """The byte where each sample of a tar file begins. Only headers are read."""
    starts, last = array("q"), None
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ManifestError(f"{str(path)!r} is empty, expected a tar file; get it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            place = 0
            while place + 512 <= size and data[place]:
                kind = data[place + 156]
                if kind in _PLAIN:
                    try:
                        length = int(data[place + 124 : place + 135], 8)
                    except ValueError as error:
                        raise _damaged(path, place) from error
                    name, following = data[place : place + 100], place + 512 + (length + 511 & ~511)
                    if data[place + 345]:  # the beginning of a long name
                        name = data[place + 345 : place + 500].rstrip(b"\0") + b"/" + name
                    name = name.partition(b"\0")[0]
                    if data[place + 257 : place + 262] != b"ustar" and not name.isascii():
                        raise _damaged(path, place)
                else:
                    try:
                        found = next(_tar(file, place), None)
                    except tarfile.TarError as error:
                        raise _damaged(path, place) from error
                    if found is None:
                        break
                    info, following = found
                    name = info.name.encode(errors="surrogateescape") if info.isreg() else b""
                if following > size:
                    raise _damaged(path, place)
                base = name.rpartition(b"/")[2]
                if b"." in base and not base.startswith(b"."):
                    key = name[: len(name) - len(base)] + base.partition(b".")[0]
                    if key != last:
                        starts.append(place)
                        last = key
                place = following
            if place + 512 > size:  # a whole one ends with zeros
                raise _damaged(path, place)
    return starts


_PLAIN = frozenset(b"0\0")
"""Types of members that are files under a name of at most 255 bytes."""


def _damaged(path: Path, place: int) -> ManifestError:
    return ManifestError(f"{str(path)!r} is damaged or cut off at byte {place:,}, expected a tar file; get it again.")


def _members(file: Any, start: int) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of samples from a place on. Hidden files and files without a suffix belong to no sample."""
    for info, _ in _tar(file, start):
        base = os.path.basename(info.name)
        if info.isreg() and "." in base and not base.startswith("."):
            yield info.name, info


def _tar(file: Any, start: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The members from a place on, each with the place of the next."""
    file.seek(start)
    try:
        with tarfile.TarFile(fileobj=file, mode="r") as tar:  # reads the first header
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if info.sparse is not None:  # its bytes do not stand one after the other
                    raise tarfile.ReadError(f"{info.name!r} is stored with holes; write the tar file without --sparse")
                yield info, tar.offset
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:  # numbers and names of a header that are none raise anything
        raise tarfile.ReadError(f"a header that is none, {error}") from error


_KINDS: dict[str, Callable[[Path, Sequence[Path]], Source]] = {".parquet": _Parquet, ".tar": _Tars}
