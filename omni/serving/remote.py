"""Downloads a file for a client. A client must not use this server to reach addresses that only this machine can reach.

A name is looked up once, all of its IP addresses are checked, and the connection goes to one of them. So it does not matter
if the name resolves to something else a moment later. Redirects are followed one by one under the same rule. Files on this
machine cannot be named at all.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore2

MAX_BYTES = 20_000_000
MAX_REDIRECTS = 5
MAX_SECONDS = 20.0
"""Seconds for all steps together."""

_UNICAST = tuple(map(ipaddress.ip_network, ("0.0.0.0/0", "2000::/3")))
"""The ranges that hold all public addresses; `_SPECIAL` excludes parts of them. Other IPv6 ranges are for this machine,
private and link-local networks, multicast, and forms that stand for an IPv4 address (::/96, NAT64)."""

_SPECIAL = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",  # this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # between a provider and its customers; also metadata of a cloud
            "127.0.0.0/8",  # this machine
            "168.63.129.16/32",  # services of a cloud for its own machines
            "169.254.0.0/16",  # link-local, with the metadata of most clouds
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocols; also metadata of a cloud
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # AS112, anycast
            "192.52.193.0/24",  # AMT, anycast
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # AS112
            "198.18.0.0/15",  # measurements
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/3",  # multicast, reserved, broadcast
            "2001::/23",  # protocols, with Teredo, which stands for an IPv4 address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which stands for an IPv4 address
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
"""IANA's special-purpose addresses. Python's own list differs from version to version."""

_LOOKUPS = ThreadPoolExecutor(16, "lookup")
"""Threads that look up names, so that a slow lookup blocks nothing else."""


class RemoteError(ValueError):
    """An address is refused, or gives no file. The message is one sentence."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet: not this machine, a private network or a cloud's metadata."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    return any(ip in network for network in _UNICAST) and not any(ip in network for network in _SPECIAL)


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
