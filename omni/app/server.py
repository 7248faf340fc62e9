"""Serving the page: where it listens, where its files are, and what a browser may load.

Nothing leaves the machine: no analytics, no share link, no fonts or scripts from elsewhere, and a policy in the headers by
which a browser would refuse them.
"""

import os
import signal
import socket
import tempfile
import webbrowser
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omni.loading.checkpoint import load

POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
"""What a browser may load: what comes from here. gradio's scripts stand in the page, and make functions of templates."""


class AppError(ValueError):
    """A page that cannot be served; the message is one sentence."""


def serve(checkpoint: str | Path, host: str = "127.0.0.1", port: int = 7860, browse: bool = False) -> None:
    """Serve the page until the process is interrupted.

    Args:
        checkpoint: folder of a fused model, loaded as `omni ask` loads it.
        host, port: where to listen.
        browse: open the page in this machine's browser.

    Raises:
        AppError: packages that are missing, or an address at which nobody can listen.
        CheckpointError: a checkpoint that cannot answer.
    """
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise AppError(f"No page can be served at {host}:{port} ({error}); choose another --port or --host.") from error
    with listening, tempfile.TemporaryDirectory(prefix="omni-app-") as folder, suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # who is ended so leaves no files behind either
        # before gradio is imported: it makes a folder at once, by default one that is everybody's
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            import uvicorn
            from fastapi import FastAPI

            from .page import mount
        except ImportError as error:
            missing = f"The page needs packages that are not installed ({error}): pip install 'omni-thinker[app]'."
            raise AppError(missing) from error
        app = FastAPI(openapi_url=None)
        mount(app, *load(checkpoint))
        app.add_middleware(_Policy)
        if browse:
            webbrowser.open(f"http://{host}:{port}")
        # pages that are open would hold it up
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listening])


class _Policy:
    """Adds `POLICY` to every response; what an ASGI server calls."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def send_with(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with)
