"""Which picture files are meant by folders, patterns and manifests; nothing is opened to find out.

    find_pictures(["photos", "more/**/*.jpg", "birds.jsonl"])

| given                    | pictures                                                                                   |
|--------------------------|--------------------------------------------------------------------------------------------|
| a folder                 | the files in it, at any depth, that are named like pictures (`SUFFIXES`) and not hidden    |
| a pattern such as *.jpg  | the files that match it and are named like pictures; ** is any number of folders           |
| .jsonl, .json or .csv    | those that the rows of this manifest name, whatever their names, there or not; a row need  |
|                          | not say anything about them                                                                |
| a picture                | itself                                                                                     |
"""

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import NoReturn

from omni.data.manifests import Manifest
from omni.data.sources import SUFFIXES

EXPECTED = "a folder, a pattern such as 'photos/**/*.jpg', a manifest (.jsonl, .json, .csv) or a picture"


class SourceError(ValueError):
    """Something that names no pictures. The message is one sentence: what was found and expected, what to do."""


def find_pictures(sources: Iterable[str | Path]) -> list[str]:
    """The paths of all picture files that are meant, as they are found, each once, sorted.

    Raises:
        SourceError: a source that does not exist, names not a single picture, or has a folder that cannot be read.
        ManifestError: a manifest or a row of it that cannot be understood.
    """
    found: set[str] = set()
    for source in map(str, sources):
        pictures = set(_find(source))
        if not pictures:
            raise SourceError(
                f"{source!r} holds no picture, expected files that end with {', '.join(sorted(SUFFIXES))}; check the path."
            )
        found |= pictures
    return sorted(found)


def _find(source: str) -> Iterable[str]:
    if os.path.isdir(source):
        return (os.path.join(folder, name) for folder, files in _walk(source) for name in files if _is_picture(name))
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isfile(source):
        if suffix in (".jsonl", ".json", ".csv"):
            return (str(path) for row in Manifest.read(source, answers=False) for path in row.pictures)
        if suffix in SUFFIXES:
            return [source]
        raise SourceError(f"{source!r} is a file of another kind, expected {EXPECTED}; check the path.")
    if has_magic(source):
        start, parts = "/" * source.startswith("/"), re.split("/+", source.lstrip("/"))
        return (path for path in _match(start, parts) if _is_picture(path) and not os.path.isdir(path))
    where = "" if os.path.isabs(source) else f" in {os.getcwd()!r}"
    raise SourceError(f"{source!r} does not exist{where}, expected {EXPECTED}; check the path.")


def _match(folder: str, parts: Sequence[str]) -> Iterator[str]:
    """The paths in a folder ("" is the current one) that match the parts of a pattern.

    They are those of `glob.glob`, which leaves out folders that cannot be read, and goes round where links do.
    """
    part, *rest = parts
    if part == "**":  # any number of folders, and at the end of a pattern whatever is in them
        for below, _ in _walk(folder or "."):
            yield from _match(below if folder else below[2:], rest or ["*"])
        return
    if has_magic(part):
        names = fnmatch.filter(_names(folder or "."), part)
        names = [name for name in names if part.startswith(".") or not name.startswith(".")]
    else:
        names = [part] if _kind(os.path.join(folder, part), follow=False) else []
    for path in (os.path.join(folder, name) for name in names):
        if not rest:
            yield path
        elif _is_folder(path):
            yield from _match(path, rest)


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Folders at any depth that are not hidden, and the names of their files.

    Links are followed; a folder that can be reached in several ways, or from within itself, is walked once.
    """
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(top, followlinks=True, onerror=_refuse):
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            folders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, files


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        _refuse(error)


def _kind(path: str, follow: bool = True) -> int:
    """What is at a path, a file or a folder, as `stat` has it; 0 is nothing."""
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        if error.errno == errno.ELOOP:
            return 0
        error.filename = os.path.dirname(path) or "."  # it is this one that may not be searched
        _refuse(error)


def _is_folder(path: str) -> bool:
    return stat.S_ISDIR(_kind(path))


def _is_picture(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _refuse(error: OSError) -> NoReturn:
    raise SourceError(
        f"The folder {error.filename!r} cannot be read ({error.strerror}), expected to look for pictures in it; change its "
        "permissions, or name those beside it."
    ) from error
