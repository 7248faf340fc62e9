"""Reads ordinary files, or raises one sentence that says why not. Writes files whole or not at all."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


class ReadError(Exception):
    """A file cannot be read. The message is one sentence: which one, what was expected and found, what to do.

    Attributes:
        kind: "missing", "too large", or "unreadable".
    """

    def __init__(self, sentence: str, kind: str = "unreadable") -> None:
        super().__init__(sentence)
        self.kind = kind


def read_whole(path: str, noun: str, expected: str, most_bytes: int) -> bytes:
    """The content of an ordinary file.

    The kind of file is checked before it is opened, because opening a pipe may wait for ever.

    Args:
        path: path of the file.
        noun: the word for its content in messages, such as "picture".
        expected: the expected content, such as "a PNG picture".
        most_bytes: the largest size.

    Raises:
        ReadError: the file is missing, no ordinary file, not readable, or too large.
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
                return file.read(size)  # not more: a file in /proc has size 0 and may never end
    except (FileNotFoundError, NotADirectoryError) as error:
        if re.match(r"[a-z]+://", path):
            raise ReadError(f"{name} is an address, expected a file; download the {noun} first.") from error
        where = "" if os.path.isabs(path) else f" in {os.getcwd()!r}"
        raise ReadError(f"{name} does not exist{where}, expected {expected}; check the path.", "missing") from error
    except PermissionError as error:
        problem = "may not be read by this user, expected a readable file; change its permissions"
        raise ReadError(f"{name} {problem}.") from error
    except (OSError, ValueError) as error:  # a path that is too long, has a null byte or a circle of links; or the disk
        raise ReadError(f"{name} cannot be opened ({error}), expected {expected}; check the path.") from error
    if stat.S_ISDIR(kind):
        raise ReadError(f"{name} is a folder, expected {expected}; pass one of the files in it.")
    raise ReadError(f"{name} is a pipe or a device, expected an ordinary file; save the {noun} first.")


MAX_JSON = 2**28
"""Largest size of a JSON document in bytes. The largest in use are tokenizers, of about 30 million."""


def expect_ordinary(path: Path) -> Path:
    """Refuse a pipe or a device, because opening or reading it may wait for ever. Returns the path.

    Raises:
        OSError: the path is a pipe or a device. A missing file is no error here.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a pipe or a device, expected an ordinary file", str(path))
    return path


def read_json(path: Path) -> Any:
    """The value in a JSON file (UTF-8).

    Raises:
        OSError: the file is missing, no ordinary file, or not readable.
        ValueError: the file is no JSON, is larger than `MAX_JSON`, is nested too deep, or has a key twice in one object.
    """
    if expect_ordinary(path).is_file() and (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"it has {size:,} bytes, expected at most {MAX_JSON:,}")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_keys_once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:100]!r} occurs twice in one object")
        found[key] = value
    return found


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under a hidden name in the same folder, and rename it when it is complete on the disk.

    An earlier file at `path` stays until then, and survives a full disk or a kill. A path that is no regular file, such as
    /dev/stdout, is written to directly.

    Args:
        path: path of the file.
        write: called with the open file, writes the content.

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
