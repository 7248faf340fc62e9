"""How long a server waits for its clients."""

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 10.0
"""Seconds that a client may take to begin a request, and to receive data that was sent to it."""


class Connection(H11Protocol):
    """A connection that closes when its client keeps the server waiting too long.

    uvicorn alone would wait for ever for the rest of a request, and for a client that does not read.
    """

    def connection_made(self, transport: Any) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._look()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # a request has begun
            self._since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. If it comes behind an answer, uvicorn would answer a second time, which h11 refuses."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _look(self) -> None:
        if self.transport.is_closing():
            return
        now = self.loop.time()
        if not (self.conn.their_state is h11.IDLE or self.flow.write_paused):
            self._since = now
        if now - self._since > IDLE_SECONDS:
            self.transport.abort()
        else:
            self.loop.call_later(IDLE_SECONDS / 4, self._look)
