"""Serves the page until the process is interrupted.

Nothing leaves the machine. The page uses no fonts or scripts of other sites, and its headers tell browsers to refuse them.
"""

import signal
import socket
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from omni.loading.checkpoint import load

CONNECTIONS = 256
"""The largest number of connections at the same time. Further visitors get an error."""


class AppError(ValueError):
    """The page cannot be served. The message is one sentence."""


def serve(
    checkpoint: str | Path,
    host: str = "127.0.0.1",
    port: int = 7860,
    browse: bool = False,
    listening: Callable[[str], None] = lambda where: None,
    dtype: str = "auto",
) -> None:
    """Serve the page until the process is interrupted.

    Args:
        checkpoint: folder of a fused model, loaded as `omni ask` loads it.
        host, port: where to listen.
        browse: open the page in this machine's browser.
        listening: called before the checkpoint is loaded, with where the page will be and for whom.
        dtype: precision of the weights, see `omni.loading.checkpoint.load`.

    Raises:
        AppError: packages are missing, or the address cannot be used.
        CheckpointError: the checkpoint cannot answer.
    """
    with _listen(host, port) as opened, suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # an interrupt is no error
        try:
            import uvicorn
            from starlette.middleware import Middleware

            from omni.connections import Connection

            from .door import Door, Reach
            from .page import make_app
        except ImportError as error:
            missing = f"The page needs packages that are not installed ({error}): pip install 'omni-thinker[app]'."
            raise AppError(missing) from error
        reach = Reach.of(host, opened)
        listening(reach.sentence)
        app = make_app(*load(checkpoint, dtype), middleware=[Middleware(Door, reach=reach)])
        if browse:
            webbrowser.open(reach.address)
        config = uvicorn.Config(
            app,
            http=Connection,
            log_level="warning",
            ws="none",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,  # otherwise open pages keep the server running
        )
        uvicorn.Server(config).run(sockets=[opened])


def _listen(host: str, port: int) -> socket.socket:
    if not host.strip():
        raise AppError(
            "The host is empty; name an address of this machine, such as 127.0.0.1, or 0.0.0.0 for every network."
        )
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (
        OSError,
        ValueError,
        TypeError,
        OverflowError,
    ) as error:  # Python raises these for invalid hosts and ports
        raise AppError(
            f"No page can be served at host {host!r}, port {port} ({error}); choose another --port or --host."
        ) from error
