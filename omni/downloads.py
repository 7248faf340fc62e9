"""Reads files at addresses. Size and time are bounded, whatever the other side does.

Rows name addresses, and others write rows. So only the public internet is read, unless the user allows private networks: a
name is looked up once, all of its IP addresses are checked, and the connection goes to one of them. Redirects are followed
under the same rule.

Python itself reads the web, because fsspec would need another package for it.
"""

import binascii
import http.client
import socket
import threading
import urllib.request as web
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from io import BytesIO
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from omni.files import ReadError
from omni.networks import is_public

SILENCE = 60
"""A web server that says nothing for so many seconds has failed."""

AT_ONCE = 2**18
"""So many bytes are read at a time."""

SECONDS = 600
"""The longest time for the file of one item."""

LISTING = 600
"""The longest time in which the files at an address are listed, in seconds."""

MOST_MATCHES = 1_000_000
"""The largest number of files that a pattern may match."""

_STORES = frozenset(
    {"abfs", "abfss", "adl", "az", "file", "gcs", "gs", "hf", "local", "memory", "oci", "oss", "s3", "s3a"}
)
"""Kinds of addresses whose host is in the user's settings, not in the address."""

T = TypeVar("T")


def download(address: str, to: BinaryIO, most_bytes: int, seconds: float, allow_private: bool = False) -> None:
    """Write the file at an address to an open file.

    Args:
        address: such as "https://example.org/a.png", or any that fsspec opens.
        to: the open file.
        most_bytes: the largest size.
        seconds: the longest time, for all steps together.
        allow_private: read from this machine and private networks, too, and by all protocols of fsspec.

    Raises:
        ReadError: it cannot be read, is too large, takes too long, or is not public. Some of it may have been written.
    """
    over = threading.Event()
    try:
        _in_time(address, lambda: _copy(address, to, most_bytes, over, allow_private), seconds)
    finally:
        over.set()


def content_of(text: str, most_bytes: int) -> bytes | None:
    """The file at a web address, or in a data URI of base64. None for any other text.

    Raises:
        ReadError: there is no such file; see `download`.
    """
    start = text[:8].lower()
    if start.startswith(("http://", "https://")):
        download(text, found := BytesIO(), most_bytes, SECONDS)
        return found.getvalue()
    if not start.startswith("data:"):
        return None
    try:
        return b64decode("".join(text.partition(",")[2].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ReadError(f"{text[:60]!r} is no base64 ({error}), expected a data URI of a file; correct it.") from error


def matches(pattern: str, allow_private: bool = False) -> list[str]:
    """The addresses of all files that a pattern matches, sorted.

    Raises:
        ReadError: they cannot be listed, are too many, take too long, or are not public.
    """

    def find() -> list[str]:
        system, there = _system(pattern, allow_private)
        found: list[Any] = system.glob(there)
        if len(found) > MOST_MATCHES:
            raise ReadError(f"{pattern!r} matches more than {MOST_MATCHES:,} files; make it narrower.", "too large")
        return sorted(str(system.unstrip_protocol(each)) for each in found)

    return _in_time(pattern, find, LISTING)


def _in_time(address: str, work: Callable[[], T], seconds: float) -> T:
    """The result of some work. It is done in a thread, which is left alone when the time is over."""
    outcome = Future[T]()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # it is raised by the caller
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        if not wait([outcome], seconds).done:
            raise ReadError(
                f"{address!r} takes longer than {seconds:,.0f} seconds; try again, or download it first and name the file."
            )
        return outcome.result()
    except ReadError:
        raise
    except Exception as error:  # each file system has its own
        reason = str(error).partition("\n")[0].rstrip(".") or type(error).__name__
        kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        raise ReadError(
            f"{address!r} cannot be fetched ({reason}), expected a file; check the address.", kind
        ) from error


def _copy(address: str, to: BinaryIO, most_bytes: int, over: threading.Event, allow_private: bool) -> None:
    with _open(address, allow_private) as found:
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


def _open(address: str, allow_private: bool) -> Any:
    if address.lower().startswith(("http://", "https://")):
        request = web.Request(address, headers={"User-Agent": "omni"})
        return _web(allow_private).open(request, timeout=SILENCE)
    system, there = _system(address, allow_private)
    return system.open(there, "rb")


def _system(address: str, allow_private: bool) -> tuple[Any, str]:
    """A file system of fsspec, and the path there."""
    kinds = {part.partition("://")[0].lower() for part in address.split("::")}
    if not allow_private and not kinds <= _STORES:
        raise ReadError(
            f"{address!r} may be in a private network, as fsspec does not check that; download it first, or allow "
            "private networks for rows (`allow_private` beside `addresses`, or --allow-private)."
        )
    import fsspec

    system, there = fsspec.core.url_to_fs(address)
    return system, there


def _size(found: Any) -> int | None:
    """The number of bytes that an open address promises; None if it does not tell."""
    size = found.headers.get("Content-Length") if hasattr(found, "headers") else getattr(found, "size", None)
    return None if size is None else int(size)


def _too_large(address: str, most_bytes: int, found: str) -> ReadError:
    return ReadError(
        f"{address!r} is too large, expected at most {most_bytes:,} bytes, found {found}; make a smaller file of it.",
        "too large",
    )


# --- The web ----------------------------------------------------------------------------------------------------------


def _web(allow_private: bool) -> web.OpenerDirector:
    """What opens http and https alone, also after redirects."""
    opener = web.OpenerDirector()
    pages: tuple[web.BaseHandler, ...] = (_Public(), _PublicSecure())
    if allow_private:
        pages = (web.HTTPHandler(), web.HTTPSHandler())
    errors = web.HTTPErrorProcessor(), web.HTTPDefaultErrorHandler(), web.HTTPRedirectHandler(), web.UnknownHandler()
    for handler in (web.ProxyHandler(), *pages, *errors):
        opener.add_handler(handler)
    return opener


class _Connection(http.client.HTTPConnection):
    """Connects to public IP addresses alone."""

    def connect(self) -> None:
        self._create_connection = _connect_public  # of a class that stands behind both kinds of connections
        super().connect()


class _SecureConnection(http.client.HTTPSConnection):
    """Connects to public IP addresses alone. The certificate is that of the name."""

    def connect(self) -> None:
        self._create_connection = _connect_public
        super().connect()


class _Public(web.HTTPHandler):
    def http_open(self, request: web.Request) -> Any:
        return self.do_open(_connection(request, _Connection, http.client.HTTPConnection), request)


class _PublicSecure(web.HTTPSHandler):
    def https_open(self, request: web.Request) -> Any:
        return self.do_open(_connection(request, _SecureConnection, http.client.HTTPSConnection), request)


def _connection(request: web.Request, checked: Any, plain: Any) -> Any:
    """The class of a connection. A proxy of the user's own may be anywhere, and connects by its own rules."""
    target = urlsplit(request.full_url).hostname or ""
    if request.host == urlsplit(request.full_url).netloc.rpartition("@")[2]:
        return checked
    with suppress(OSError):  # it may be that the proxy alone knows the name
        _public_addresses(target, 0)
    return plain


def _connect_public(place: tuple[str, int], timeout: Any = None, source: Any = None, **settings: Any) -> socket.socket:
    """As `socket.create_connection`."""
    *others, last = _public_addresses(*place)
    for address in others:
        try:
            return socket.create_connection((address, place[1]), timeout, source)
        except OSError:  # this machine may have no route to addresses of this kind
            continue
    return socket.create_connection((last, place[1]), timeout, source)


def _public_addresses(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not all(map(is_public, addresses)):
        raise ReadError(
            f"{host!r} is this machine or in a private network, where nothing is read from; download the file first, or "
            "allow private networks for rows (`allow_private` beside `addresses`, or --allow-private)."
        )
    return addresses
