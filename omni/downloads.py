"""Reads files at addresses. Size and time are bounded, whatever the other side does.

Python itself reads the web, because fsspec would need another package for it.
"""

import threading
from concurrent.futures import Future, wait
from typing import Any, BinaryIO
from urllib.request import Request, urlopen

from omni.files import ReadError

SILENCE = 60
"""A web server that says nothing for so many seconds has failed."""

AT_ONCE = 2**18
"""So many bytes are read at a time."""


def download(address: str, to: BinaryIO, most_bytes: int, seconds: float) -> None:
    """Write the file at an address to an open file.

    The clock does not wait for the other side: the bytes come in a thread, which is left alone when the time is over.

    Args:
        address: such as "https://example.org/a.png", or any that fsspec opens.
        to: the open file.
        most_bytes: the largest size.
        seconds: the longest time, for all steps together.

    Raises:
        ReadError: it cannot be read, is too large, or takes too long. Some of it may have been written.
    """
    over, outcome = threading.Event(), Future[None]()

    def copy() -> None:
        try:
            _copy(address, to, most_bytes, over)
            outcome.set_result(None)
        except BaseException as error:  # it is raised by the caller
            outcome.set_exception(error)

    threading.Thread(target=copy, daemon=True).start()
    try:
        if not wait([outcome], seconds).done:
            raise ReadError(
                f"{address!r} takes longer than {seconds:,.0f} seconds; try again, or download it first and name the file."
            )
        outcome.result()
    except ReadError:
        raise
    except Exception as error:  # each file system has its own
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise ReadError(
            f"{address!r} cannot be fetched ({reason}), expected a file; check the address.", kind
        ) from error
    finally:
        over.set()


def _copy(address: str, to: BinaryIO, most_bytes: int, over: threading.Event) -> None:
    with _open(address) as found:
        size = _size(found)
        if size is not None and size > most_bytes:
            raise _too_large(address, most_bytes, f"{size:,}")
        held = 0
        while not over.is_set() and (data := found.read(AT_ONCE)):
            held += len(data)
            if held > most_bytes:
                raise _too_large(address, most_bytes, "more")
            to.write(data)
    if size is not None and held != size:
        raise OSError(f"{held:,} bytes of {size:,} came")


def _open(address: str) -> Any:
    if address.lower().startswith(("http://", "https://")):
        return urlopen(Request(address, headers={"User-Agent": "omni"}), timeout=SILENCE)
    import fsspec

    system, there = fsspec.core.url_to_fs(address)
    return system.open(there, "rb")


def _size(found: Any) -> int | None:
    """The number of bytes that an open address promises; None if it does not tell."""
    size = found.headers.get("Content-Length") if hasattr(found, "headers") else getattr(found, "size", None)
    return None if size is None else int(size)


def _too_large(address: str, most_bytes: int, found: str) -> ReadError:
    return ReadError(
        f"{address!r} is too large, expected at most {most_bytes:,} bytes, found {found}; make a smaller file of it.",
        "too large",
    )
