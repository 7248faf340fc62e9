"""Which clients are allowed, and the form of refusals."""

import ipaddress
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class Doorkeeper:
    """Refuses requests that a page of another site sends through a visitor's browser.

    Such a page may send requests to any address. The browser then names the page's site in the header Origin. If the site's
    own name resolves to this machine (DNS rebinding), that name is in the header Host.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], hosts: set[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        headers = Request(scope).headers
        host, origins = headers.get("host", ""), headers.getlist("origin")
        if not self._knows(host):
            found = f"This server is not called {host[:100]!r}; start it with --allowed-host and that name if it is."
        elif foreign := [each for each in origins if each not in (f"http://{host}", f"https://{host}")]:
            found = f"Pages of {foreign[0][:100]!r} may not ask this server; ask it by a program."
        else:
            await self._app(scope, receive, send)
            return
        await refused(None, HTTPException(403, found))(scope, receive, send)

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return not name or name in self._hosts
        return True  # an IP address is no name, so nobody else can own it


def refused(http: Any, error: Any) -> Response:
    """A refusal in the form that OpenAI's clients expect."""
    status = getattr(error, "status", None) or error.status_code
    message = str(getattr(error, "detail", error))
    if message == HTTPStatus(status).phrase:
        message = f"This server has nothing at {http.url.path[:100]!r} for {http.method}."
    kind = "invalid_request_error" if status < 500 else "server_error"
    described = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": described}, status_code=status, headers=getattr(error, "headers", None))
