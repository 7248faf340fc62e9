"""A file is written whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside its place under a hidden name, and rename it when all of it is on the disk.

    Whatever was at `path` stays there until then. A full disk or a kill leaves it as it was.

    Args:
        path: where the file goes.
        write: gets the open file and writes the content.

    Raises:
        OSError: the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except Exception:
        aside.unlink(missing_ok=True)
        raise
