"""Which requests the page allows. A visitor's browser may also show pages of other sites, which may send requests here. So
each request is checked: the name by which it reached this machine, and the site of the page that sent it.
"""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = {
    "default-src": "'self'",
    "img-src": "'self' data:",  # pictures are part of the page itself
    "media-src": "blob:",  # files that the script fetched from this server
    "style-src": "'self' 'unsafe-inline'",
    "base-uri": "'self'",
    "form-action": "'self'",
    "frame-ancestors": "'self'",
}
"""What a browser may load: only what comes from this server."""

HEADERS = {
    "content-security-policy": "; ".join(f"{rule} {sources}" for rule, sources in POLICY.items()),
    "cache-control": "no-store",  # so that nothing is written to a disk
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), display-capture=(), geolocation=(), microphone=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every response."""


@dataclass(frozen=True)
class Reach:
    """The address and the names by which the page can be reached.

    The owner of a name can make it resolve to any machine, even to this one, and so put their page and this page behind one
    name (DNS rebinding). So only known names are allowed. An IP address cannot be misused like that.

    Attributes:
        host: the host as the user gave it.
        port: the port.
        listens: the IP address that the server listens at.
        names: allowed names, in lower case, beside IP addresses.
    """

    host: str
    port: int
    listens: ipaddress.IPv4Address | ipaddress.IPv6Address
    names: frozenset[str]

    @classmethod
    def of(cls, host: str, listening: socket.socket) -> "Reach":
        """The reach of a listening socket."""
        address, port, *_ = listening.getsockname()
        listens, names = ipaddress.ip_address(address), {"localhost", host.lower()}
        if not listens.is_loopback:
            own = socket.gethostname().lower()
            names |= {own, f"{own}.local"}
        return cls(host, port, listens, frozenset(names))

    def knows(self, host: str) -> bool:
        """Whether a request may name this host, with or without a port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return address.is_loopback or not self.listens.is_loopback

    @property
    def address(self) -> str:
        """The address of the page for a browser on this machine."""
        host = "localhost" if self.listens.is_unspecified else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def sentence(self) -> str:
        """A sentence that says where the page is, and who can reach it."""
        if self.listens.is_loopback:
            return f"at {self.address}, for this machine alone"
        others = "by any address of this machine" if self.listens.is_unspecified else "there"
        return f"at {self.address}, and {others} for everybody on its networks; there is no password"


class Door:
    """An ASGI application that refuses requests for other names than the page's, and from pages of other sites."""

    def __init__(self, app: ASGIApp, reach: Reach) -> None:
        self.app, self.reach = app, reach

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""

        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif refusal := self._refusal(Headers(scope=scope)):
            await PlainTextResponse(refusal, 403)(scope, receive, send_with)
        else:
            await self.app(scope, receive, send_with)

    def _refusal(self, headers: Headers) -> str | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self.reach.knows(hosts[0]):
            found = ", ".join(map(repr, hosts)) or "no host"
            return (
                f"The request is for {found}, which is not this page; open {self.reach.address}, or name the host that "
                "leads here: omni app --host NAME."
            )
        if foreign := [origin for origin in origins if origin not in _origins(hosts[0])]:
            return (
                f"The request comes from a page of {foreign[0]!r}, expected one of {hosts[0]!r}; open this page itself."
            )
        return None


def _origins(host: str) -> tuple[str, str]:
    """The possible origins of a page from this host; a proxy in front of it may use https."""
    return f"http://{host}", f"https://{host}"
