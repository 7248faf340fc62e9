"""Downloads a file for a client. A client must not use this server to reach addresses that only this machine can reach.

A name is looked up once, all of its IP addresses are checked, and the connection goes to one of them. So it does not matter
if the name resolves to something else a moment later. Redirects are followed one by one under the same rule. Files on this
machine cannot be named at all.
"""

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2

from omni.networks import is_public

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 5
MAX_SECONDS = 20.0
"""Seconds for all steps together."""

_LOOKUPS = ThreadPoolExecutor(16, "lookup")
"""Threads that look up names, so that a slow lookup blocks nothing else."""


class RemoteError(ValueError):
    """An address is refused, or gives no file. The message is one sentence."""


class _Network(httpcore2.AnyIOBackend):
    """Connects only to allowed IP addresses."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        """Look up the name, check the addresses, and connect to one that was checked."""
        look_up = asyncio.get_running_loop().run_in_executor
        try:
            found = await look_up(_LOOKUPS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            raise RemoteError(f"The name {host[:100]!r} is not known ({error}); correct the address.") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not all(map(self._allowed, addresses)):
            raise RemoteError(
                f"The address {host[:100]!r} is this machine or in a private network, where files are not fetched from; "
                "send the file itself, as a data URI."
            )
        for address in addresses[:-1]:
            try:
                return await super().connect_tcp(address, port, *args, **kwargs)
            except httpcore2.NetworkError:  # this machine may have no route to addresses of this kind
                continue
        return await super().connect_tcp(addresses[-1], port, *args, **kwargs)


async def fetch(url: str, allowed: Callable[[str], bool] = is_public, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes behind an http or https address.

    Args:
        url: the address.
        allowed: whether the server may connect to an IP address; called for every IP address of a name.
        max_bytes: the largest size of the file.

    Raises:
        RemoteError: the address is of another kind or not allowed, or gives no usable file.
    """
    try:
        async with asyncio.timeout(MAX_SECONDS):
            return await _follow(url, allowed, max_bytes)
    except TimeoutError as error:
        raise RemoteError(f"{url[:100]!r} takes longer than {MAX_SECONDS:.0f} seconds; try again.") from error


async def _follow(url: str, allowed: Callable[[str], bool], max_bytes: int) -> bytes:
    """The bytes at an address, after redirects."""
    async with httpcore2.AsyncConnectionPool(network_backend=_Network(allowed)) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            try:
                parts = urlsplit(url)
                usable = (
                    parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isascii()
                )
            except ValueError:
                usable = False
            if not usable:
                raise RemoteError(f"Expected an http or https address, found {url[:100]!r}; or send a data URI.")
            try:
                async with pool.stream("GET", url) as response:
                    headers = {name.lower(): value for name, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                        url = urljoin(url, headers[b"location"].decode("latin-1"))
                        continue
                    if response.status != 200:
                        raise RemoteError(f"{url[:100]!r} answers with status {response.status}, expected 200.")
                    received = bytearray()
                    async for chunk in response.aiter_stream():
                        received += chunk
                        if len(received) > max_bytes:
                            raise RemoteError(f"{url[:100]!r} has more than {max_bytes:,} bytes; send a smaller one.")
                    return bytes(received)
            except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, UnicodeError) as error:
                why = str(error) or type(error).__name__
                raise RemoteError(f"{url[:100]!r} cannot be fetched ({why}); correct the address.") from error
    raise RemoteError(f"{url[:100]!r} is the end of more than {MAX_REDIRECTS} redirects; name the file's own address.")
