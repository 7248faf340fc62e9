"""Which clients the server accepts, and how long they may keep silent: real sockets, and short time limits."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from omni import connections
from omni.connections import Connection
from omni.serving import server
from omni.serving.server import build
from omni.serving.worker import Worker

SHORT = 0.3  # seconds
QUESTION = {"messages": [{"role": "user", "content": "what shape"}], "max_tokens": 2}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], int]]:
    """`run(app)` serves an application as `omni serve` does, with less patience; returns its port."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", SHORT)
    monkeypatch.setattr(server, "BODY_SECONDS", SHORT)
    with ExitStack() as stack:

        def start(app: Any) -> int:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
            config = uvicorn.Config(
                app, http=Connection, lifespan="off", log_level="warning", timeout_graceful_shutdown=1
            )
            running = uvicorn.Server(config)
            thread = threading.Thread(target=running.run, args=([listening],))
            thread.start()

            def stop() -> None:
                running.should_exit = True
                thread.join()

            stack.callback(stop)
            return int(listening.getsockname()[1])

        yield start


@pytest.fixture
def port(run: Callable[[Any], int], make_pair: Callable[..., Any]) -> Iterator[int]:
    """The port of a tiny model, whose machine is called `here` too."""
    worker = Worker(*make_pair())
    yield run(build(worker, ["tiny", "a/folder"], {"here"}, lambda address: False))
    worker.close()


def post(
    port: int, body: Any = QUESTION, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions"
) -> Any:
    """Status and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers or {})
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side hangs up, after whatever it still says."""
    connection.settimeout(20)
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


BEGUN = [
    b"",
    b"P",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: local",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET",  # an answer, and then half a question
]


def test_connections_that_say_nothing_are_closed_and_the_others_answered(port: int) -> None:
    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for number, each in enumerate(waiting):
        each.sendall(BEGUN[number % len(BEGUN)])
    assert post(port)[0] == 200
    assert all(map(is_closed, waiting))
    assert post(port)[0] == 200
    for each in waiting:
        each.close()


def test_what_is_not_http_behind_an_answer_ends_the_connection(run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The answer does not wait for the body, as a refusal does not."""

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 403, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})

    head = b"POST /ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", run(refuse)), timeout=20) as odd:
        odd.sendall(head)
        assert odd.recv(1000).startswith(b"HTTP/1.1 403 ")
        odd.sendall(b"zz\r\n")
        assert is_closed(odd)
    assert not [each for each in caplog.records if each.exc_info]


def test_a_request_must_come_to_an_end(port: int) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
        slow.sendall(head)
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_large_requests_wait_for_their_turn_and_small_ones_do_not(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 60)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n{"
    large = [socket.create_connection(("127.0.0.1", port)) for _ in range(server.TURNS)]
    for each in large:
        each.sendall(head)
    assert post(port)[0] == 200
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(post, port, json.dumps(QUESTION).encode() + b" " * 2_000_000)
        assert [post(port)[0] for _ in range(10)] == [200] * 10
        assert not waiting.done()
        for each in large:
            each.close()
        assert waiting.result()[0] == 200


def test_a_client_that_does_not_read_is_left(run: Callable[[Any], int]) -> None:
    ended = threading.Event()

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while not (gone.done() and gone.result()["type"] == "http.disconnect"):
            gone = asyncio.create_task(receive()) if gone.done() else gone
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            await asyncio.sleep(0)
        ended.set()

    with socket.create_connection(("127.0.0.1", run(endless))) as silent:
        silent.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ended.wait(20)


def test_clients_that_wait_or_ask_again_stay_connected(run: Callable[[Any], int]) -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(SHORT * 2 if scope["path"] == "/slow" else 0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b"x"})

    connection = http.client.HTTPConnection("127.0.0.1", run(slow), timeout=20)
    connection.connect()
    own = connection.sock
    for path in ["/slow", *["/"] * 15]:
        connection.request("GET", path)
        assert connection.getresponse().read() == b"x"
    assert connection.sock is own
    connection.close()


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8000", "192.168.1.5:80", "here", "here:1"]
)
def test_the_names_of_this_machine(port: int, host: str) -> None:
    assert post(port, headers={"Host": host})[0] == 200
    assert post(port, headers={"Host": host, "Origin": f"http://{host}"})[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "here.evil.example:80", "[::1", "a@b"])
def test_a_name_that_somebody_else_lets_stand_for_this_machine(port: int, host: str) -> None:
    for path in ("/v1/chat/completions", "/v1/models", "/nowhere"):
        status, found = post(port, headers={"Host": host}, path=path)
        assert status == 403
        assert found["error"]["message"].startswith(f"This server is not called {host!r}; start it with --allowed-host")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://[", "https://localhost.evil.example", "http://localhost:3000"]
)
def test_pages_of_others(port: int, origin: str) -> None:
    status, found = post(port, headers={"Host": "localhost", "Origin": origin, "Content-Type": "text/plain"})
    assert (status, found["error"]["message"]) == (
        403,
        f"Pages of {origin!r} may not ask this server; ask it by a program.",
    )
