"""Write a file whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a hidden name in the same folder, and rename it once all of it is on the disk.

    Until then an earlier file at `path` stays. A full disk or a kill leaves it unchanged. A path that is no regular
    file, such as /dev/stdout, is written to directly.

    Args:
        path: path of the file.
        write: gets the open file, and writes the content.

    Raises:
        OSError: the file cannot be written.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            write(file)
        return
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


def write_text_whole(path: Path, text: str) -> None:
    """Write text in UTF-8, as `write_whole` does.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, lambda file: file.write(text.encode()))
