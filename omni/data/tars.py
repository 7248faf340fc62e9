"""Rows of tar files: samples of webdataset. Memory holds only where samples begin."""

import hashlib
import mmap
import os
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct
from typing import Any

from omni.data.sources import SAYINGS, Held, ManifestError, Source
from omni.data.texts import parse_object
from omni.items import suffixes


class Tars(Source):
    """Samples of webdataset. A file of a sample that stands alone in its tar file is read from there."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, digest = files, hashlib.sha256()
        self._starts, self._ends = array("q"), array("q")
        for file in files:
            starts = _samples(file)
            self._starts += starts
            self._ends.append(len(self._starts))
            digest.update(f"{file.name} {os.path.getsize(file)}\n".encode(errors="surrogateescape"))
            digest.update(starts.tobytes())
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """See `Source`."""
        file = self._file(index)
        first = self._ends[file - 1] if file else 0
        return f"{self.files[file]}, sample {index - first + 1}"

    def fields(self, index: int) -> dict[str, Any]:
        """See `Source`."""
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

    def digest(self) -> str:
        """See `Source`."""
        return self._digest

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
        fields = {key: value for key, value in fields.items() if key not in (*SAYINGS, "answer")} | {"text": text}
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
                name, digits, kind, magic, prefix = _HEADER.unpack_from(data, place)
                if kind in _PLAIN:
                    try:
                        length = int(digits, 8)
                    except ValueError as error:
                        raise _damaged(path, place) from error
                    following = place + 512 + (length + 511 & ~511)
                    if prefix != b"\0":  # the beginning of a long name
                        name = data[place + 345 : place + 500].rstrip(b"\0") + b"/" + name
                    name = name.partition(b"\0")[0]
                    if magic != b"ustar" and not name.isascii():
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
                folder, slash, base = name.rpartition(b"/")
                stem, dot, _ = base.partition(b".")
                if stem and dot and (key := folder + slash + stem) != last:
                    starts.append(place)
                    last = key
                place = following
            if place + 512 > size:  # a whole one ends with zeros
                raise _damaged(path, place)
    return starts


_HEADER = Struct("100s 24x 11s 21x c 100x 5s 83x c 166x")
"""Of a member's header: name, size in octal digits, type, format, and the first byte of what stands before the name."""
_PLAIN = (b"0", b"\0")
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
    except Exception as error:  # invalid numbers and names in a header may raise anything
        raise tarfile.ReadError(f"a header that is not valid: {error}") from error
