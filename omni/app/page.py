"""The routes of the page: what visitors may send, and the responses.

A visitor sends text, a number, or the bytes of a file, each up to a limit. No request can name a file or an address. Data
stay in memory, under a token that only the page that sent them has. Responses are lines of JSON, each {id of an element:
its HTML}.
"""

import asyncio
import json
import mimetypes
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path

from anyio import CancelScope
from PIL.Image import Image
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from omni.checkpoints.folder import ADAPTERS
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.items import read_item, suffixes
from omni.looking.attention import AttentionError
from omni.modality import ItemError
from omni.questions import QuestionError
from omni.registry import get_modality

from . import markup
from .knows import knowledge
from .visit import IDLE, LONGEST, MOST_BYTES, VISITORS, Visit, Visits, takes

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = {"scene.png": "what is below the heart", "second.png": "describe the picture"}
"""Questions about example files, which exist if omni runs from its repository."""

ARRIVING = 4
"""The number of files that are received and opened at the same time. Others wait."""

PATIENCE = 60
"""Seconds that an upload may take."""

LINES = "application/x-ndjson"

Parts = dict[str, str]
"""New contents of elements of the page, by their ids."""


def make_app(
    model: OmniForConditionalGeneration, processor: OmniProcessor, middleware: Sequence[Middleware] = ()
) -> Starlette:
    """The application with the page at its root, to be served by an ASGI server."""
    page = _Page(model, processor)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(page.sweep())
        yield
        sweeping.cancel()

    return Starlette(
        routes=page.routes(),
        middleware=middleware,
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )


class _Page:
    """The handlers of the routes.

    Args:
        model, processor: they answer one visitor after the other.
    """

    def __init__(self, model: OmniForConditionalGeneration, processor: OmniProcessor) -> None:
        self.model, self.processor, self.visits = model, processor, Visits()
        self.bundles = takes(processor)
        own = suffixes(bundle.name for bundle in self.bundles)
        self.examples = [name for name in QUESTIONS if name.endswith(own) and (EXAMPLES / name).is_file()]
        self.turn, self.arriving = asyncio.Lock(), asyncio.Semaphore(ARRIVING)

    def routes(self) -> list[Route]:
        """All routes."""
        name = str(self.model.config.name_or_path)
        merged = (Path(name) / ADAPTERS).is_file()  # then the fingerprints are those before adapters were merged
        fingerprints = None if merged else self.model.config.fingerprints
        known = knowledge(name, self.processor.bundles)
        page = HTMLResponse(
            markup.page(
                markup.header(name, known, self.model.num_parameters(), fingerprints),
                markup.chooser(self.bundles, [*map(self._example, self.examples)]) if self.bundles else "",
                self.processor.prompt,
            )
        )
        always = [
            Route("/", lambda request: page),
            *(Route(f"/{name}", partial(_own, name)) for name in ("page.css", "page.js", "recorder.js")),
            Route("/visits", self.open, methods=["POST"]),
            Route("/visits", self.leave, methods=["DELETE"]),
            Route("/ask", self.ask, methods=["POST"]),
        ]
        if not self.bundles:
            return always
        return [
            *always,
            Route("/items", self.upload, methods=["POST"]),
            Route("/items/{key}", self.file),
            Route("/examples/{number}", self.pick, methods=["POST"]),
            Route("/remove/{number}", self.remove, methods=["POST"]),
            Route("/look/{number}", self.look, methods=["POST"]),
        ]

    async def sweep(self) -> None:
        """Forget idle visitors, once a minute."""
        while True:
            await asyncio.sleep(60)
            self.visits.sweep()

    async def open(self, request: Request) -> Response:
        """A visitor opens the page."""
        return PlainTextResponse(self.visits.open())

    async def leave(self, request: Request) -> Response:
        """A visitor leaves."""
        self.visits.leave(request.headers.get("visit", ""))
        return Response(status_code=204)

    async def upload(self, request: Request) -> Response:
        """A visitor sends a file."""
        visit, name = self._visit(request), request.query_params.get("name", "")
        if len(name) > 255:
            raise HTTPException(400, f"The name of the file has {len(name):,} characters, expected at most 255.")
        async with self.arriving:
            file = await receive_body(request, MOST_BYTES, repr(name))
            kind = request.headers.get("content-type", "")
            return await run_in_threadpool(self._choose, visit, name, file, kind, _together(request))

    async def file(self, request: Request) -> Response:
        """A visitor plays an item that they sent."""
        visit, key = self._visit(request), request.path_params["key"]
        for item in visit.items:
            if item.key == key and item.media_type:
                return Response(item.file, media_type=item.media_type)
        raise HTTPException(404, "There is no such file; load the page again.")

    async def pick(self, request: Request) -> Response:
        """A visitor picks an example."""
        visit, number = self._visit(request), _number(request)
        if number >= len(self.examples):
            raise HTTPException(404, "There is no such example.")
        name = self.examples[number]
        file, kind = (EXAMPLES / name).read_bytes(), mimetypes.guess_type(name)[0] or ""
        others = {"question": QUESTIONS[name]}
        return await run_in_threadpool(self._choose, visit, name, file, kind, _together(request), **others)

    def _example(self, name: str) -> tuple[Image | None, str]:
        modality, value = read_item(EXAMPLES / name, [bundle.name for bundle in self.bundles])
        show = get_modality(modality).show
        return show and show(value), QUESTIONS[name]

    def _choose(self, visit: Visit, name: str, file: bytes, kind: str, together: bool, **others: str) -> Response:
        refused = []
        try:
            visit.choose(name, file, kind, self.processor, together)
        except ItemError as error:
            refused.append(str(error))
        parts = {**_all_of(visit), "notice": markup.notice(refused), **others}
        return Response(_line(parts), 422 if refused else 200, media_type=LINES)

    async def remove(self, request: Request) -> Response:
        """A visitor removes an item."""
        visit = self._visit(request)
        visit.remove(_number(request))
        return Response(_line(await run_in_threadpool(_all_of, visit)), media_type=LINES)

    async def ask(self, request: Request) -> Response:
        """A visitor asks a question."""
        visit = self._visit(request)
        try:
            question = (await receive_body(request, 4 * LONGEST, "The question")).decode()
        except UnicodeDecodeError as error:
            raise HTTPException(400, f"The question is not text in UTF-8 ({error}).") from error
        return Lines(self._answering(visit, question))

    async def _answering(self, visit: Visit, question: str) -> AsyncGenerator[bytes, None]:
        visit.wait()
        parts = await run_in_threadpool(_looks_of, visit)
        yield _line({**parts, "answer": markup.waiting(), "turns": markup.turns(visit)})
        async with self.turn:
            answers = visit.ask(question, self.model, self.processor)
            try:
                async for each in iterate_in_threadpool(answers):
                    yield _line({"answer": markup.answered(visit.as_it_is()) if each.seconds else markup.writing(each)})
            except (QuestionError, ItemError) as error:
                yield _line({"notice": markup.notice([str(error)]), "answer": ""})
            finally:  # also if the visitor has left, so that the next visitor's turn begins after writing has stopped
                with CancelScope(shield=True):
                    await run_in_threadpool(answers.close)

    async def look(self, request: Request) -> Response:
        """A visitor looks at a word."""
        return Lines(self._looking(self._visit(request), _number(request)))

    async def _looking(self, visit: Visit, word: int) -> AsyncGenerator[bytes, None]:
        async with self.turn:
            try:
                await run_in_threadpool(visit.look, word)
            except AttentionError as error:
                yield _line({"notice": markup.notice([str(error)])})
                return
        yield _line(await run_in_threadpool(_looks_of, visit))

    def _visit(self, request: Request) -> Visit:
        """The visit that a request belongs to."""
        visit = self.visits.find(request.headers.get("visit", ""))
        if visit is None:
            raise HTTPException(
                410,
                f"This visit is forgotten, because nothing was done for {IDLE / 60:.0f} minutes or {VISITORS} others "
                "came; load the page again.",
            )
        return visit


class Lines(StreamingResponse):
    """A response of lines. When the client is gone, it closes the generator of the lines."""

    def __init__(self, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(lines, media_type=LINES)
        self.lines = lines

    async def stream_response(self, send: Send) -> None:
        """As in the base class; then close the generator."""
        async with aclosing(self.lines):
            await super().stream_response(send)


async def receive_body(request: Request, most: int, what: str) -> bytes:
    """The body of a request. It is received to its end even if it is too large: a browser that still sends reads no answer.

    Args:
        request: the request.
        most: the largest size in bytes.
        what: the subject of error messages.

    Raises:
        HTTPException: the body is too large, too slow, or cut off.
    """
    kept, size = bytearray(), 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    kept += chunk
    except TimeoutError:
        raise HTTPException(408, f"{what} did not arrive within {PATIENCE} seconds; send it again.") from None
    except ClientDisconnect:
        raise HTTPException(400, f"{what} was cut off; send it again.") from None
    if size > most:
        raise HTTPException(413, f"{what} has {size:,} bytes, expected at most {most:,}; make it smaller.")
    return bytes(kept)


def _number(request: Request) -> int:
    """The number at the end of a path."""
    text = request.path_params["number"]
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise HTTPException(404, f"Expected a number of up to five digits, found {text[:20]!r}.")
    return int(text)


def _together(request: Request) -> bool:
    return request.query_params.get("together") == "true"


def _all_of(visit: Visit) -> Parts:
    """All parts of the page for a visit."""
    visit = visit.as_it_is()
    return {"items": markup.items(visit), "turns": markup.turns(visit), "answer": markup.answered(visit), "notice": ""}


def _looks_of(visit: Visit) -> Parts:
    """The parts of the page that change when a visitor looks at a word. Players are not among them, so they keep playing."""
    visit = visit.as_it_is()
    return {**markup.views(visit), "answer": markup.answered(visit), "notice": ""}


def _own(name: str, request: Request) -> Response:
    """A static file of the page."""
    return FileResponse(Path(__file__).with_name(name))


def _line(parts: Parts) -> bytes:
    return json.dumps(parts).encode() + b"\n"


async def _refused(request: Request, error: Exception) -> Response:
    """The response to a request that is refused."""
    assert isinstance(error, HTTPException)
    sentence = error.detail
    if sentence == HTTPStatus(error.status_code).phrase:
        sentence = f"This page has nothing at {request.url.path[:100]!r} for {request.method}."
    return Response(_line({"notice": markup.notice([sentence])}), error.status_code, error.headers, LINES)
