"""The server: connections, routes, and refusals in the form that OpenAI's clients expect.

    bytes -> requests.py -> remote.py, for files at an address -> worker.py -> replies.py -> bytes

Slow work is done in other threads, so that connections do not block each other.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, StreamingResponse
from starlette.responses import Response as Bytes
from starlette.routing import Route

from omni.connections import Connection
from omni.loading.checkpoint import load
from omni.networks import is_public

from .connections import Doorkeeper, refused
from .fields import RequestError, parse
from .remote import MAX_BYTES, MAX_SECONDS, RemoteError, fetch
from .replies import REPLIES, Reply, failure
from .requests import Chat, Completion, Embeddings, Loading, Request, Response
from .worker import FAILED, Worker
from .writing import Event, Job

MAX_BODY = 50 * 2**20
"""The largest size of a request in bytes."""
LARGE = 2**20
"""Requests of more bytes than this are read `TURNS` at a time, so that few of them are in memory."""
TURNS = 4
"""The number of large requests that are read at once, and of requests that download files at once."""
BODY_SECONDS = 60
"""Seconds that a client may take to send a request, once its turn has come."""
MAX_CONNECTIONS = 512


class ServingError(ValueError):
    """The server cannot be started. The message is one sentence."""


def serve(
    checkpoint: str | Path,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    allow_private: bool = False,
    ready: Callable[[], None] = lambda: None,
    name: str | None = None,
    allowed_hosts: Sequence[str] = (),
    dtype: str = "auto",
) -> None:
    """Serve a checkpoint with OpenAI's interface until the process is interrupted.

    Args:
        checkpoint: folder of a fused model, loaded as `omni ask` loads it.
        host, port: where to listen.
        device: "cpu", "cuda:0" and the like; "auto" takes an accelerator if there is one.
        allow_private: fetch files from addresses of this machine and of private networks, too.
        ready: called once, when the server is ready.
        name: the model's name for clients, who may also use `checkpoint`; by default the folder's name.
        allowed_hosts: names of the server that clients may use, beside `host`, the machine's own name and IP addresses.
        dtype: precision of the weights, see `omni.loading.checkpoint.load`.

    Raises:
        ServingError: the address cannot be used, or the model cannot answer on this device.
        CheckpointError: the checkpoint cannot answer.
    """
    if not host:
        raise ServingError("Expected a --host to listen at, found an empty one; 0.0.0.0 is every network.")
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(accelerator or "cpu")
    with ExitStack() as stack:
        listening = [stack.enter_context(each) for each in _listen(host, port)]
        model, processor = load(checkpoint, dtype)
        try:
            model.to(device)
            worker = Worker(model, processor)
            worker.try_out()
        except Exception as error:  # a device may raise nearly anything
            raise ServingError(f"The model cannot answer on device {device!r} ({error}); try --device cpu.") from error
        stack.callback(worker.close)
        names = [name or Path(checkpoint).resolve().name, str(checkpoint)]
        app = build(
            worker, names, {host, socket.gethostname(), *allowed_hosts}, is_public if not allow_private else _any
        )
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        ready()
        uvicorn.Server(config).run(listening)


def _any(address: str) -> bool:
    return True


def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A socket for each address of a host name. `localhost` has one of IPv4 and one of IPv6."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in {(family, address) for family, *_, address in found}:
            yield socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        raise ServingError(
            f"No server can listen at {host}:{port} ({error}); choose another --port or --host."
        ) from error


# --- The application --------------------------------------------------------------------------------------------------


def build(worker: Worker, names: Sequence[str], hosts: set[str], allowed: Callable[[str], bool]) -> Starlette:
    """The ASGI application that hands requests to a worker.

    Args:
        worker: the model.
        names: names of the model that clients may use; answers have the first.
        hosts: names of the server that clients may use, beside `localhost`.
        allowed: whether files may be downloaded from an IP address.
    """
    listed = {"id": names[0], "object": "model", "created": 0, "owned_by": "omni"}

    def only(name: str | None) -> None:
        if name is not None and name not in names:
            raise HTTPException(404, f"Expected the model {names[0]!r}, found {name!r}; this server has no other.")

    async def models(http: Http) -> Bytes:
        return JSONResponse({"object": "list", "data": [listed]})

    async def model(http: Http) -> Bytes:
        only(http.path_params["name"])
        return JSONResponse(listed)

    async def health(http: Http) -> Bytes:
        return JSONResponse({"status": "ok"})

    async def load_model(http: Http) -> Bytes:
        """`transformers chat` calls this first."""
        only(parse(Loading, await _read(http, LARGE)).model)
        return Bytes(f"data: {json.dumps({'status': 'ready', 'cached': True})}\n\n", media_type="text/event-stream")

    def answers(kind: type[Request | Embeddings]) -> "_Answers":
        return _Answers(kind, worker, names[0], only, allowed, turns)

    turns = _Turns()
    return Starlette(
        routes=[
            Route("/v1/chat/completions", answers(Chat), methods=["POST"]),
            Route("/v1/completions", answers(Completion), methods=["POST"]),
            Route("/v1/responses", answers(Response), methods=["POST"]),
            Route("/v1/embeddings", answers(Embeddings), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/load_model", load_model, methods=["POST"]),
        ],
        middleware=[Middleware(Doorkeeper, hosts={"localhost", *hosts})],
        exception_handlers={
            RequestError: refused,
            HTTPException: refused,
            ClientDisconnect: _left_early,
            Exception: _failed,
        },
    )


class _Turns:
    """Limits the number of large requests in memory. The others wait."""

    def __init__(self) -> None:
        self.large, self.fetching = asyncio.Semaphore(TURNS), asyncio.Semaphore(TURNS)


class _Answers:
    """The route of one interface, as an ASGI application. A request keeps its turn until the answer is sent."""

    def __init__(
        self,
        kind: type[Request | Embeddings],
        worker: Worker,
        name: str,
        only: Callable[[str | None], None],
        allowed: Callable[[str], bool],
        turns: _Turns,
    ) -> None:
        self._kind, self._worker, self._name = kind, worker, name
        self._only, self._allowed, self._turns = only, allowed, turns

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        http = Http(scope, receive)
        length = http.headers.get("content-length", "")
        async with AsyncExitStack() as held:
            if not length.isdigit() or int(length) > LARGE:
                await held.enter_async_context(self._turns.large)
            request = await asyncio.to_thread(parse, self._kind, await _read(http))
            answering = asyncio.create_task(self._respond(request, held))
            leaving = asyncio.create_task(_left(http))
            try:
                await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    return
            finally:
                leaving.cancel()
                answering.cancel()
            await answering.result()(scope, receive, send)

    async def _respond(self, request: Request | Embeddings, held: AsyncExitStack) -> Bytes:
        """The whole answer, or the beginning of a stream. Errors of a request are raised before the stream begins."""
        self._only(request.model)
        await self._fetch(request, held)
        job, reply = self._worker.take(request), REPLIES[self._kind](self._name, request)
        answer = job.answer()
        try:
            if not request.stream:
                return JSONResponse(await reply.whole(answer))
            first = await anext(answer)
        except BaseException:
            job.wanted = False
            raise
        return StreamingResponse(_events(job, reply, _chain(first, answer)), media_type="text/event-stream")

    async def _fetch(self, request: Request | Embeddings, held: AsyncExitStack) -> None:
        """Download the items that have an address."""
        remote = [(where, part, part.remote) for where, part in request.items() if part.remote]
        if not remote:
            return
        await held.enter_async_context(self._turns.fetching)
        left, until = MAX_BYTES, asyncio.get_running_loop().time() + MAX_SECONDS
        for where, part, address in remote:
            try:
                async with asyncio.timeout_at(until):
                    data = await fetch(address, self._allowed, left)
            except TimeoutError as error:
                late = (
                    f"The files as far as {where} take longer than {MAX_SECONDS:.0f} seconds; send them as data URIs."
                )
                raise RequestError(late) from error
            except RemoteError as error:
                raise RequestError(f"The {part.noun} in {where} cannot be used: {error}") from error
            left -= len(data)
            part.fetched(data)


async def _events(job: Job, reply: Reply, answer: AsyncIterator[Event]) -> AsyncIterator[str]:
    """The events of a stream that has begun."""
    try:
        async for event in reply.stream(answer):
            yield event
    except RequestError as error:
        yield failure(str(error))
    finally:
        job.wanted = False


async def _chain(first: Event, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    yield first
    async for each in rest:
        yield each


async def _left(http: Http) -> None:
    """Wait until the client is gone."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _read(http: Http, most: int = MAX_BODY) -> bytes:
    """The body of a request."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                size += len(chunk)
                if size <= most:  # the rest is read and dropped, because a client that is still sending reads no answer
                    body += chunk
    except TimeoutError as error:
        raise HTTPException(
            408, f"Expected the whole request within {BODY_SECONDS} seconds; send it faster."
        ) from error
    if size > most:
        expected = f"Expected a request of at most {most:,} bytes, found {size:,}; send smaller files."
        raise HTTPException(413, expected)
    return bytes(body)


def _left_early(http: Any, error: Any) -> Bytes:
    return Bytes(status_code=499)  # no client reads it


def _failed(http: Any, error: Any) -> Bytes:
    return refused(http, HTTPException(500, FAILED))
