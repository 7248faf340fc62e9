"""Find out by the contents of a path how the rows of a data set lie there.

| contents                                | rows                                                                       |
|-----------------------------------------|----------------------------------------------------------------------------|
| folder with metadata.jsonl or .csv      | the "imagefolder" of `datasets`: `file_name` and a text in each row        |
| folder of folders of files              | one per file, sorted by path (2 before 10); the folder's name is the answer|
| .jsonl, or a .json of the same content  | an object per line                                                         |
| .json                                   | a list of objects, such as `{"image": "a.png", "caption": "a wren"}`       |
| .csv                                    | columns of the same names                                                  |
| .parquet, a folder or a pattern of them | columns as in JSON; an item is a struct of `bytes` and `path`, or bytes    |
| .tar, a folder or a pattern of them     | webdataset: the files of a sample share a name up to the first dot; `.txt` |
|                                         | is its caption, `.cls` its class, `.json` has columns as in JSON           |
| a folder that `datasets` saved          | as Parquet                                                                 |

A source reads a row on access. A row that cannot be parsed raises on access. A file that cannot be split into rows raises at
once.
"""

import os
import re
from collections.abc import Callable, Sequence
from glob import glob, has_magic
from pathlib import Path

from omni.data.arrow import Parquet, Saved
from omni.data.classes import METADATA, ClassFolders
from omni.data.sources import ManifestError, Source, is_address
from omni.data.tars import Tars
from omni.data.texts import open_text

_EXPECTED = "a folder of files or a .jsonl, .json, .csv, .parquet or .tar file"
_TEXTS = (".jsonl", ".json", ".csv")
_SHARDS: dict[str, Callable[[Sequence[Path]], Source]] = {".parquet": Parquet, ".tar": Tars}
_PART = re.compile(r"(train|test|valid(ation)?|val|dev|eval)(?=[-_.])")
"""Files of a folder that begin with these words are parts of a data set."""


def open_source(path: Path) -> Source:
    """The rows at a path of text or of folders by class; see `open_shards` for the others.

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
            return _open_file(found[0]) if found else ClassFolders(path)
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
    if path.suffix.lower() not in _TEXTS:
        raise ManifestError(f"{str(path)!r} is of an unknown kind, expected {_EXPECTED}; convert it.")
    return open_text(path)


def open_shards(path: Path) -> Source | None:
    """The rows at a path that hold their items: Parquet, tar files, a saved data set; None if there are none.

    Raises:
        ManifestError: a file cannot be read.
    """
    try:
        if path.is_dir():
            if (path / "dataset_dict.json").is_file():
                inside = ", ".join(sorted(repr(each.name) for each in path.iterdir() if each.is_dir()))
                raise ManifestError(f"{str(path)!r} holds the parts {inside}; name one of these folders.")
            if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
                return Saved(path)
            if any((path / name).is_file() for name in METADATA):
                return None
            names = (name for name in os.listdir(path) if name.lower().endswith(tuple(_SHARDS)) and name[0] != ".")
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
            if len({each.suffix.lower() for each in files}) > 1 or files[0].suffix.lower() not in _SHARDS:
                raise ManifestError(f"{str(path)!r} should match .parquet or .tar files alone; make it narrower.")
        else:
            files = [path] if path.is_file() else []
        if files and files[0].name.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            raise ManifestError(f"{str(files[0])!r} is compressed, expected a .tar file; unpack it.")
        if files and (kind := _SHARDS.get(files[0].suffix.lower())):
            return kind(files)
    except OSError as error:
        name = str(error.filename or path)
        raise ManifestError(
            f"{name!r} cannot be read ({error.strerror or error}); check it and its permissions."
        ) from error
    return None
