"""Fetch a file for a client, who must not reach through this machine what only this machine can reach.

A name is looked up once, all of its addresses are judged, and the connection goes to one of these: what the name stands
for a moment later does not matter. Redirects are followed one by one, each under the same rule. Files on this machine
have no address here at all.
"""

import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2

MAX_BYTES = 50_000_000
MAX_REDIRECTS = 5
MAX_SECONDS = 20.0
"""For everything together."""

_EMBEDDING = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))
"""IPv6 addresses that stand for an IPv4 one, which may be anything: NAT64, 6to4, Teredo."""


class RemoteError(ValueError):
    """An address that nothing is fetched from, or that gave nothing; the message is one sentence."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not of this machine, a private network, a cloud's metadata."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _EMBEDDING):
            return False
    return ip.is_global and not ip.is_multicast


class _Network(httpcore2.SyncBackend):
    """Connections to allowed addresses alone."""

    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore2.NetworkStream:
        """Look the name up, judge, connect to the address that was judged."""
        try:
            found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError) as error:
            raise RemoteError(f"The name {host!r} is not known ({error}); correct the address.") from error
        if not all(map(self._allowed, found)):
            raise RemoteError(
                f"The address {host!r} is this machine or in a private network, where pictures are not fetched from; send "
                "the picture itself, as a data URI."
            )
        return super().connect_tcp(found[0], port, *args, **kwargs)


def fetch(url: str, allowed: Callable[[str], bool] = is_public, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes behind an http or https address.

    Args:
        url: the address.
        allowed: whether an IP address may be connected to; asked about each one that a name stands for.
        max_bytes: refuse what is larger.

    Raises:
        RemoteError: another kind of address, one that is not allowed, or nothing usable there.
    """
    until = time.monotonic() + MAX_SECONDS
    with httpcore2.ConnectionPool(network_backend=_Network(allowed)) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            try:
                parts = urlsplit(url)
                usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isascii()
            except ValueError:
                usable = False
            if not usable:
                raise RemoteError(f"Expected an http or https address, found {url[:100]!r}; or send a data URI.")
            left = max(until - time.monotonic(), 0.1)
            timeout = dict.fromkeys(("connect", "read", "write", "pool"), left)
            try:
                with pool.stream("GET", url, extensions={"timeout": timeout}) as response:
                    headers = {name.lower(): value for name, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                        url = urljoin(url, headers[b"location"].decode("latin-1"))
                        continue
                    if response.status != 200:
                        raise RemoteError(f"{url[:100]!r} answers with status {response.status}, expected 200.")
                    received = bytearray()
                    for chunk in response.iter_stream():
                        received += chunk
                        if len(received) > max_bytes:
                            raise RemoteError(
                                f"{url[:100]!r} has more than {max_bytes:,} bytes; send a smaller picture."
                            )
                        if time.monotonic() > until:
                            raise RemoteError(f"{url[:100]!r} took longer than {MAX_SECONDS:.0f} seconds; try again.")
                    return bytes(received)
            except (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, UnicodeError) as error:
                why = str(error) or type(error).__name__
                raise RemoteError(f"{url[:100]!r} cannot be fetched ({why}); correct the address.") from error
    raise RemoteError(
        f"{url[:100]!r} is the end of more than {MAX_REDIRECTS} redirects; name the picture's own address."
    )
