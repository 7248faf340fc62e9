"""List the files of one modality in folders, patterns and manifests, without opening any.

    find_files(["photos", "more/**/*.jpg", "birds.jsonl"], get_modality("image"))

| source                   | files                                                                                      |
|--------------------------|--------------------------------------------------------------------------------------------|
| a folder                 | the files in it, at any depth, that have a suffix of the modality and are not hidden       |
| a pattern such as *.jpg  | the files that match it by the rules of Python's `glob`, ** included, and have such a      |
|                          | suffix                                                                                     |
| .jsonl, .json or .csv    | the files that the rows of this manifest name, whatever their suffix, existing or not;     |
|                          | rows need no answer                                                                        |
| a file with such a suffix| itself                                                                                     |
"""

import os
from collections.abc import Iterable, Iterator
from glob import escape, has_magic, iglob
from itertools import dropwhile
from pathlib import Path
from typing import NoReturn

from omni.data.manifests import Manifest, Row
from omni.modality import Modality
from omni.registry import open_item

_EXPECTED = "a folder, a pattern such as 'photos/**/*.jpg' or a manifest (.jsonl, .json, .csv)"


class SourceError(ValueError):
    """A source names no files. The message is one sentence: what was found and expected, what to do."""


def find_files(sources: Iterable[str | Path], modality: Modality) -> list[str]:
    """The paths of all files of a modality in some sources, each once, sorted.

    Raises:
        SourceError: a source does not exist, holds no such file, or has a folder that cannot be read.
        ManifestError: a manifest or one of its rows cannot be read.
        ValueError: the modality has no files.
    """
    open_item(modality.name)  # refuses a modality without files
    found: set[str] = set()
    for source in map(str, sources):
        files = set(_find(source, modality))
        if not files:
            raise SourceError(
                f"{source!r} holds no {modality.noun}, expected files that end with {', '.join(modality.suffixes)}; check "
                "the path."
            )
        found |= files
    return sorted(found)


def _find(source: str, modality: Modality) -> Iterable[str]:
    def owns(path: str) -> bool:
        name = os.path.basename(path)
        return not name.startswith(".") and os.path.splitext(name)[1].lower() in modality.suffixes

    if os.path.isdir(source):
        return (os.path.join(folder, name) for folder, files in _walk(source) for name in files if owns(name))
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isfile(source):
        if suffix in (".jsonl", ".json", ".csv"):
            return (str(path) for row in Manifest.read(source, answers=False) for path in _files(row, modality))
        if suffix in modality.suffixes:
            return [source]
        raise SourceError(
            f"{source!r} is a file of another kind, expected a {modality.noun}, or {_EXPECTED}; check the path."
        )
    expect_source(source)
    return (path for path in _matches(source) if owns(path) and not os.path.isdir(path))


def expect_source(source: str) -> None:
    """Check that a source exists, or is a pattern. Nothing is read.

    Raises:
        SourceError: there is no such file or folder.
    """
    if os.path.exists(source) or has_magic(source):
        return
    where = "" if os.path.isabs(source) else f" in {os.getcwd()!r}"
    raise SourceError(f"{source!r} does not exist{where}, expected {_EXPECTED}; check the path.")


def _files(row: Row, modality: Modality) -> list[Path]:
    """The files of a row, which have to be files: the table names them by their paths."""
    if any(file.data is not None for file in row.files):
        raise SourceError(
            f"{row.source} holds a {modality.noun} in itself, expected the path of a file; write it to a file first."
        )
    return row.of(modality.name)


def _matches(pattern: str) -> Iterator[str]:
    """Yield the paths that match a pattern. Python's `glob` goes round in circles where a folder links to itself."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from iglob(pattern)
        return
    at = parts.index("**")
    rest = list(dropwhile("**".__eq__, parts[at:])) or ["*"]
    for top in iglob(os.path.join(*parts[:at])) if at else [os.curdir]:
        if os.path.isdir(top):
            for folder, _ in _walk(top):
                inside = folder if at else os.path.normpath(folder).removeprefix(os.curdir)
                yield from _matches(os.path.join(escape(inside), *rest))


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield all folders that are not hidden, at any depth, with the names of their files.

    Links are followed. A folder that can be reached in several ways, or from itself, is visited once.
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


def _refuse(error: OSError) -> NoReturn:
    raise SourceError(
        f"The folder {error.filename!r} cannot be read ({error.strerror}), expected one that can be listed; change its "
        "permissions, or name the other folders."
    ) from error
