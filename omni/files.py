"""Read an ordinary file, or say why not; write a file whole or not at all."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class ReadError(Exception):
    """A file that cannot be read. The message is one sentence: which, what was expected and found, what to do.

    Attributes:
        kind: "missing", "too large", or "unreadable".
    """

    def __init__(self, sentence: str, kind: str = "unreadable") -> None:
        super().__init__(sentence)
        self.kind = kind


def read_whole(path: str, noun: str, expected: str, most_bytes: int) -> bytes:
    """The content of an ordinary file.

    Anything else is told apart before it is opened, as opening a pipe would wait for ever.

    Args:
        path: path of the file.
        noun: what it holds, such as "picture".
        expected: what it should be, such as "a PNG picture".
        most_bytes: the largest size.

    Raises:
        ReadError: no such file, no ordinary file, one that may not be read, or a larger one.
    """
    name = repr(path)
    try:
        kind = os.stat(path).st_mode
        if stat.S_ISREG(kind):
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > most_bytes:
                    found = f"expected at most {most_bytes:,} bytes, found {size:,}"
                    raise ReadError(f"{name} is too large, {found}; make a smaller {noun} of it first.", "too large")
                return file.read(size)  # and no further: what the system makes up in /proc has size 0 and may never end
    except (FileNotFoundError, NotADirectoryError) as error:
        if re.match(r"[a-z]+://", path):
            raise ReadError(f"{name} is an address, expected a file; download the {noun} first.") from error
        where = "" if os.path.isabs(path) else f" in {os.getcwd()!r}"
        raise ReadError(f"{name} does not exist{where}, expected {expected}; check the path.", "missing") from error
    except PermissionError as error:
        problem = "may not be read by this user, expected a readable file; change its permissions"
        raise ReadError(f"{name} {problem}.") from error
    except (OSError, ValueError) as error:  # too long, a null byte in it, a circle of links; or the disk
        raise ReadError(f"{name} cannot be opened ({error}), expected {expected}; check the path.") from error
    if stat.S_ISDIR(kind):
        raise ReadError(f"{name} is a folder, expected {expected}; pass one of the files in it.")
    raise ReadError(f"{name} is a pipe or a device, expected an ordinary file; save the {noun} first.")


MAX_JSON = 2**28
"""Bytes of a JSON document; the largest are tokenizers, of some 30 million."""


def expect_ordinary(path: Path) -> Path:
    """The path, unless there is a pipe or a device: to open one would wait for ever, to read one may never end.

    Raises:
        OSError: there is one. A path at which there is nothing is for whoever opens it.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a pipe or a device, expected an ordinary file", str(path))
    return path


def read_json(path: Path) -> Any:
    """What a JSON file in UTF-8 holds.

    Raises:
        OSError: no such file, no ordinary file, or one that may not be read.
        ValueError: no JSON, or more of it, or nested deeper than any that is meant to be read.
    """
    if expect_ordinary(path).is_file() and (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"it has {size:,} bytes, expected at most {MAX_JSON:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


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
