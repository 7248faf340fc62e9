"""List the picture files of folders, patterns and manifests, without opening a picture.

    find_pictures(["photos", "more/**/*.jpg", "birds.jsonl"])

| source                   | pictures                                                                                   |
|--------------------------|--------------------------------------------------------------------------------------------|
| a folder                 | the files in it, at any depth, that have the suffix of a picture and are not hidden        |
| a pattern such as *.jpg  | the files that match it by the rules of Python's `glob`, ** included, and have such a      |
|                          | suffix                                                                                     |
| .jsonl, .json or .csv    | the files that the rows of this manifest name, whatever their suffix, existing or not;     |
|                          | rows need no answer                                                                        |
| a picture                | itself                                                                                     |
"""

import os
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from typing import NoReturn

from omni.data.manifests import Manifest
from omni.registry import get_modality

EXPECTED = "a folder, a pattern such as 'photos/**/*.jpg', a manifest (.jsonl, .json, .csv) or a picture"


class SourceError(ValueError):
    """A source names no pictures. The message is one sentence: what was found and expected, what to do."""


def find_pictures(sources: Iterable[str | Path]) -> list[str]:
    """The paths of all picture files of some sources, each once, sorted.

    Raises:
        SourceError: a source does not exist, holds no picture, or has a folder that cannot be read.
        ManifestError: a manifest or one of its rows cannot be read.
    """
    found: set[str] = set()
    for source in map(str, sources):
        pictures = set(_find(source))
        if not pictures:
            raise SourceError(
                f"{source!r} holds no picture, expected files that end with {', '.join(_suffixes())}; check the path."
            )
        found |= pictures
    return sorted(found)


def _suffixes() -> tuple[str, ...]:
    return get_modality("image").suffixes


def _find(source: str) -> Iterable[str]:
    if os.path.isdir(source):
        return (os.path.join(folder, name) for folder, files in _walk(source) for name in files if _is_picture(name))
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isfile(source):
        if suffix in (".jsonl", ".json", ".csv"):
            return (str(path) for row in Manifest.read(source, answers=False) for path in row.of("image"))
        if suffix in _suffixes():
            return [source]
        raise SourceError(f"{source!r} is a file of another kind, expected {EXPECTED}; check the path.")
    if has_magic(source):
        return (path for path in glob(source, recursive=True) if _is_picture(path) and not os.path.isdir(path))
    where = "" if os.path.isabs(source) else f" in {os.getcwd()!r}"
    raise SourceError(f"{source!r} does not exist{where}, expected {EXPECTED}; check the path.")


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


def _is_picture(path: str) -> bool:
    name = os.path.basename(path)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in _suffixes()


def _refuse(error: OSError) -> NoReturn:
    raise SourceError(
        f"The folder {error.filename!r} cannot be read ({error.strerror}), expected one that can be listed; change its "
        "permissions, or name the other folders."
    ) from error
