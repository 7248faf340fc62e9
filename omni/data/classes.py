"""Rows of files that lie in a folder for each answer. The folder's name is the answer."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omni.data.sources import ManifestError, Source
from omni.items import suffixes

METADATA = ("metadata.jsonl", "metadata.csv")
"""Files of a folder that describe the others."""


class ClassFolders(Source):
    """The files in the subfolders of a folder. The answer of a file is the name of its subfolder."""

    by_class = True

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
        """See `Source`."""
        return str(self.path / self.names[index])

    def digest(self) -> str:
        """See `Source`."""
        return hashlib.sha256(b"\0".join(map(os.fsencode, self.names))).hexdigest()

    def fields(self, index: int) -> dict[str, Any]:
        """See `Source`."""
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
