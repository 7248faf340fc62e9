"""The page by HTTP, without a browser: what a visitor can get, who is let in, and up to which bounds."""

import asyncio
import base64
import http.client
import json
import re
import signal
import socket
import sys
import threading
import tracemalloc
from collections.abc import AsyncGenerator, Callable, Iterator
from html import unescape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from omni.app.visit import LONGEST, MOST, MOST_BYTES, WIDTH
from omni.cli.app import app
from omni.items import read_item
from omni.looking.panels import as_seen
from omni.registry import get_modality

SCENE, QUESTION, LONG = "examples/scene.png", "what is below the heart", "describe the picture"


@pytest.fixture
def visitor(served: Any) -> Any:
    """Somebody new to the page."""
    return served.enter()


def text(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


def test_it_answers_as_omni_ask_does(visitor: Any, expected: Any) -> None:
    shown = visitor.upload(SCENE)
    assert (shown["items"].count("<img"), shown["notice"]) == (1, "")
    *_, last = visitor.send("/ask", QUESTION.encode())
    found = expected(QUESTION, SCENE)
    assert re.findall(r"<button data-word[^>]*>(.*?)</button>", last["answer"]) == list(found.words)
    assert f"{found.answer.tokens_read} tokens read, {found.answer.tokens_written} written" in text(last["answer"])


def test_what_is_wrong_is_said_in_the_words_of_the_library(visitor: Any, damaged: Any) -> None:
    for path, sentence in damaged.items():
        assert text(visitor.upload(path, 422)["notice"]) == sentence
    assert "There is no sound or picture yet" in text(visitor.send("/ask", QUESTION.encode())[-1]["notice"])
    visitor.upload(SCENE)
    assert "The question is empty" in text(visitor.send("/ask", b" ")[-1]["notice"])
    assert "not text in UTF-8" in text(visitor.send("/ask", b"\xed\xa0\x80", 400)[-1]["notice"])
    assert "moon" in text(visitor.send("/ask", QUESTION.encode())[-1]["answer"])


def test_a_browser_may_load_nothing_from_elsewhere(served: Any) -> None:
    policy = served.send("/", method="GET")[1]["Content-Security-Policy"]
    sources = {source for rule in policy.split(";") for source in rule.split()[1:]}
    assert sources == {"'self'", "'unsafe-inline'", "data:", "blob:"}
    assert re.findall("([^; ]*) blob:", policy) == ["media-src"]
    assert "microphone=(self)" in served.send("/", method="GET")[1]["Permissions-Policy"]
    assert "'unsafe-inline'" not in re.search(r"default-src([^;]*)", policy)[1]
    assert served.sent == []


# --- Any modality -----------------------------------------------------------------------------------------------------


def test_it_takes_what_the_model_takes(pictures: Any, sounds: Any, tone: bytes) -> None:
    accepts = {
        page.address: set(re.search(r'accept="([^"]*)"', page.send("/", method="GET")[2])[1].split(","))
        for page in (pictures, sounds)
    }
    assert {"image/*", ".png", ".jpg"} <= accepts[pictures.address]
    assert accepts[sounds.address] > accepts[pictures.address] | {"audio/*", ".wav", ".mp3"}
    assert "microphone" not in pictures.send("/", method="GET")[2]
    assert "microphone" in sounds.send("/", method="GET")[2]
    refused = pictures.enter().send("/items?name=a.wav", tone, 422)[-1]
    assert text(refused["notice"]).startswith("'a.wav' is not a picture that can be read")
    refused = sounds.enter().send("/items?name=a.txt", b"some notes", 422)[-1]
    assert "'a.txt' is not a picture" in text(refused["notice"])
    assert "'a.txt' is not a sound" in text(refused["notice"])


def test_a_sound_is_shown_and_played(sounds: Any, tone: bytes) -> None:
    visitor = sounds.enter()
    _, _, shown = sounds.send("/items?name=a.wav", tone, Visit=visitor.token, **{"Content-Type": "audio/wav"})
    items = json.loads(shown)["items"]
    (key,) = re.findall(r'<audio controls aria-label="play a.wav" data-play="([^"]*)">', items)
    status, headers, file = sounds.fetch(f"/items/{key}", Visit=visitor.token)
    assert (status, headers["Content-Type"], file) == (200, "audio/wav", tone)
    assert sounds.fetch(f"/items/{key}", Visit=sounds.enter().token)[0] == 404  # another's
    assert sounds.fetch(f"/items/{key}")[0] == 410
    drawn = np.asarray(Image.open(BytesIO(base64.b64decode(re.search('image/png;base64,([^"]*)', items)[1]))))
    shape = as_seen(None, get_modality("audio").show(read_item(tone).value), WIDTH)
    np.testing.assert_array_equal(drawn, shape)
    added = visitor.upload(SCENE)["items"]
    assert added.count("<audio") == 1
    assert f'data-play="{key}"' in added
    visitor.send("/remove/0")
    assert sounds.fetch(f"/items/{key}", Visit=visitor.token)[0] == 404


@pytest.mark.parametrize("kind", ["", "text/html", 'audio/wav" onerror="alert(1)', "audio/", "image/png"])
def test_only_media_types_of_sounds_are_played(sounds: Any, tone: bytes, kind: str) -> None:
    status, _, shown = sounds.send("/items?name=a", tone, Visit=sounds.enter().token, **{"Content-Type": kind})
    assert status == 200
    assert "<audio" not in shown
    assert "onerror" not in shown


@pytest.mark.new_chats
def test_nothing_typed_is_the_question_of_training(sounds: Any, tone: bytes) -> None:
    visitor = sounds.enter()
    visitor.send("/items?name=a.wav", tone)
    visitor.send("/ask", b" ")
    visitor.send("/ask", b"how many")
    turns = visitor.send("/remove/9")[-1]["turns"]
    assert re.findall("<li><p>(.*?)</p>", turns) == ["how many", "what is that"]
    assert "<q>what is that</q>" in sounds.send("/", method="GET")[2]


def test_what_was_asked_before_stays_in_sight(visitor: Any) -> None:
    visitor.upload(SCENE)
    assert visitor.send("/ask", QUESTION.encode())[0]["turns"] == ""
    first, *_ = visitor.send("/ask", LONG.encode())
    assert re.findall("<li><p>(.*?)</p><p>(.*?)</p>", first["turns"]) == [(QUESTION, "cyan moon")]
    assert "scene.png" in first["turns"]
    gone = visitor.send("/remove/0")[-1]["turns"]
    assert re.findall("<li><p>(.*?)</p>", gone) == [LONG, QUESTION]


# --- What a visitor gets ----------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture of this machine that nobody chose."""
    Image.new("RGB", (64, 48), (1, 2, 3)).save(path := tmp_path / "secret.png")
    return path


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a picture, and who asked for it."""
    asked: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            asked.append(connection.recv(1000))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/secret.png", asked
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def named(place: str) -> Iterator[tuple[str, str, bytes]]:
    """Requests that name a file or an address: method, path and body. Some pages would open it."""
    file = {"path": place, "url": place, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    for data in ([[file], False], [file, False], [[{"path": place}], False], [place, False]):
        for path in ("/gradio_api/call/choose", "/gradio_api/run/choose", "/gradio_api/queue/join", "/api/choose"):
            yield "POST", path, json.dumps({"data": data, "session_hash": "s1", "fn_index": 0}).encode()
    for path in (f"/gradio_api/file={place}", f"/file={place}", f"/gradio_api/proxy={place}", place, f"/..{place}"):
        yield "GET", path, b""
    for path in ("/page.css/..", "/page.css", "/page.js", "/recorder.js", "/examples"):
        yield "GET", f"{path}{place}", b""
    for body in (place.encode(), json.dumps(file).encode()):
        for query in (f"name={place}", f"name=a.png&path={place}&url={place}"):
            yield "POST", f"/items?{query}", body
        yield "POST", f"/examples{place}", body
        yield "POST", "/ask", body


def colors(shown: str) -> list[tuple[int, ...]]:
    """Of the pictures in a response, in the middle of each."""
    found = []
    for encoded in re.findall(r"base64,([A-Za-z0-9+/=]+)", shown):
        picture = Image.open(BytesIO(base64.b64decode(encoded))).convert("RGB")
        found.append(picture.getpixel((picture.width // 2, picture.height // 2)))
    return found


def test_what_a_visitor_names_is_not_opened(served: Any, visitor: Any, secret: Path, elsewhere: Any) -> None:
    address, asked = elsewhere
    visitor.upload(SCENE)
    (own,) = colors(visitor.send("/remove/9")[-1]["items"])
    for place in (str(secret), address):
        for method, path, body in named(place):
            headers = {"Visit": visitor.token, "Content-Type": "application/json"}
            _, _, found = served.send(path, body, method, **headers)
            for event in re.findall(r'"event_id": ?"(\w+)"', found):
                found += served.send(f"/gradio_api/call/choose/{event}", method="GET")[2]
            for color in colors(found):  # small ones differ a little
                assert max(map(abs, np.subtract(color, own))) < 8, (method, path, body)
            assert secret.read_bytes().decode(errors="replace") not in found
    assert (asked, served.sent) == ([], [])


def test_files_of_the_machine_stay_there(served: Any) -> None:
    for path in ("pyproject.toml", "/etc/passwd", "checkpoints/omni_tiny/config.json", "omni/app/page.py"):
        for before in ("/gradio_api/file=", "/page.css/../", "/", "/%2e%2e/", "/page.css%2f..%2f"):
            status, _, said = served.send(f"{before}{path}", method="GET")
            assert status == 404
            assert "This page has nothing at" in said


def test_pictures_are_their_visitors_alone(served: Any, visitor: Any, secret: Path) -> None:
    visitor.upload(secret)
    other = served.enter()
    assert other.token != visitor.token
    assert len(other.token) >= 32
    assert colors(other.send("/remove/9")[-1]["items"]) == []
    for token in ("", visitor.token[:-1], visitor.token.swapcase(), "../" + visitor.token):
        for path in ("/ask", "/remove/0", "/look/0", "/examples/0", "/items?name=a.png"):
            status, _, found = served.send(path, b"x", Visit=token)
            assert (status, colors(found)) == (410, [])
    assert "load the page again" in served.send("/ask")[2]
    assert colors(visitor.send("/remove/9")[-1]["items"]) == [(1, 2, 3)]
    served.send("/visits", method="DELETE", Visit=visitor.token)
    assert served.send("/remove/9", Visit=visitor.token)[0] == 410


def test_nothing_of_it_lies_on_a_disk(served: Any, visitor: Any) -> None:
    visitor.upload(SCENE)
    visitor.send("/ask", QUESTION.encode())
    assert list(served.files.rglob("*")) == []
    assert served.send("/", method="GET")[1]["Cache-Control"] == "no-store"


# --- Who is let in ----------------------------------------------------------------------------------------------------


def reaches(served: Any, host: str, **headers: str) -> bool:
    """Whether the page is given, and lets a visitor in, for a request that says this of itself."""
    found = [served.send("/", method="GET", Host=host, **headers), served.send("/visits", Host=host, **headers)]
    for status, sent, said in found:
        assert not [name for name in sent if name.lower().startswith("access-control-")]
        assert status == 200 or (status == 403 and said.startswith("The request ") and len(said.splitlines()) == 1)
    return {status for status, *_ in found} == {200}


def test_it_goes_by_its_own_names_alone(served: Any) -> None:
    port = served.address.rpartition(":")[2]
    own = ("localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "[::1]")
    foreign = (
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.168.1.5",
        "0.0.0.0",
        "[fe80::1]",
        "[",
    )
    for host in own:
        assert reaches(served, host)
        assert reaches(served, f"{host}:{port}")
        assert reaches(served, host, Origin=f"http://{host}")
    for host in (*foreign, "", f"evil.example@127.0.0.1.evil.example:{port}"):
        assert not reaches(served, host)
        assert not reaches(served, f"{host}:{port}", Origin=f"http://{host}:{port}")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "file://", ""]
)
def test_pages_of_others_are_refused(served: Any, origin: str) -> None:
    host = served.address.removeprefix("http://")
    assert reaches(served, host, Origin=f"http://{host}")
    assert not reaches(served, host, Origin=origin)
    assert not reaches(served, "192.168.1.5", Origin=origin)
    for method in ("OPTIONS", "DELETE", "PUT"):
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "visit"}
        status, headers, _ = served.send("/visits", method=method, Host=host, Origin=origin, **asked)
        assert status == 403
        assert not [name for name in headers if name.lower().startswith("access-control-")]


def test_no_request_has_two_hosts(served: Any) -> None:
    host, _, port = served.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert connection.recv(100).split()[1] in (b"400", b"403")


def test_a_socket_of_the_web_is_not_opened(served: Any) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}
    for path in ("/", "/ask", "/gradio_api/queue/join"):
        assert served.send(path, method="GET", **upgrade, **{"Sec-WebSocket-Version": "13"})[0] != 101


@pytest.fixture(scope="module")
def everywhere(serve: Any, shipped: Any) -> Any:
    """A page that listens at every address, spoken to at one of this machine."""
    return serve(*shipped, "0.0.0.0")


def test_on_a_network_it_goes_by_addresses_and_the_name_of_the_machine(everywhere: Any) -> None:
    """Who owns a name can let it lead here, an address they cannot."""
    for host in ("192.168.1.5", "10.0.0.7:7860", "[2001:db8::1]:80", "localhost", socket.gethostname()):
        assert reaches(everywhere, host)
        assert reaches(everywhere, host, Origin=f"http://{host}")
        assert not reaches(everywhere, host, Origin="http://evil.example")
    for host in ("evil.example", f"{socket.gethostname()}.evil.example", "192.168.1.5.evil.example"):
        assert not reaches(everywhere, host)
        assert not reaches(everywhere, host, Origin=f"http://{host}")


# --- Bounds -----------------------------------------------------------------------------------------------------------


def test_a_picture_has_bounds(visitor: Any) -> None:
    visitor.upload(SCENE)
    found = visitor.send("/items?name=large.png&together=true", bytes(MOST_BYTES + 1), 413)[-1]
    assert text(found["notice"]) == (
        f"'large.png' has {MOST_BYTES + 1:,} bytes, expected at most {MOST_BYTES:,}; make it smaller."
    )
    found = visitor.send(f"/items?name={'a' * 256}", b"", 400)[-1]
    assert "The name of the file has 256 characters" in found["notice"]
    assert visitor.send("/remove/9")[-1]["items"].count("<img") == 1


def test_pictures_and_questions_have_bounds(visitor: Any, secret: Path) -> None:
    for _ in range(MOST):
        visitor.upload(secret)
    found = visitor.upload(secret, 422)
    assert f"one too many, expected at most {MOST}" in text(found["notice"])
    assert found["items"].count("<img") == MOST
    found = visitor.send("/ask", b"a" * (LONGEST + 1))[-1]
    assert f"The question has {LONGEST + 1:,} characters" in text(found["notice"])
    found = visitor.send("/ask", b"a" * 2**20, 413)[-1]
    assert "The question has 1,048,576 bytes" in text(found["notice"])
    for number in ("-1", "9" * 5000, "1.5", "", "%D9%A1"):
        for path in ("remove", "look", "examples"):
            visitor.send(f"/{path}/{number}", status=404)
    assert visitor.send("/remove/99999")[-1]["items"].count("<img") == MOST


def test_what_is_too_much_is_not_kept() -> None:
    pytest.importorskip("starlette")
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

    from omni.app.page import receive_body

    chunks = iter(range(100))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(2**20), "more_body": next(chunks) < 99}

    tracemalloc.start()
    with pytest.raises(HTTPException, match=f"{100 * 2**20:,} bytes, expected at most {2**20:,}"):
        asyncio.run(receive_body(Request({"type": "http"}, receive), 2**20, "It"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 2**20


def test_an_answer_ends_when_nobody_listens() -> None:
    pytest.importorskip("starlette")
    from omni.app.page import Lines

    said, ended = asyncio.Event(), []

    async def lines() -> AsyncGenerator[bytes, None]:
        try:
            yield b"{}"
        finally:
            ended.append(True)

    async def receive() -> dict[str, Any]:
        await said.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            said.set()
            await asyncio.Event().wait()  # nobody takes it

    async def answer() -> None:
        response = Lines(lines())
        await response({"type": "http"}, receive, send)
        assert ended == [True]

    asyncio.run(asyncio.wait_for(answer(), 20))


def test_a_visitor_who_leaves_does_not_keep_others_waiting(served: Any, visitor: Any) -> None:
    visitor.upload(SCENE)
    for path, length in (("/items?name=a.png", 1000), ("/ask", len(LONG))):  # one cut off, one not listened to
        connection = http.client.HTTPConnection(served.address.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", path)
        connection.putheader("Visit", visitor.token)
        connection.putheader("Content-Length", str(length))
        connection.endheaders(LONG.encode())
        if path == "/ask":
            assert b"aria-busy" in connection.getresponse().readline()
        connection.close()
    other = served.enter()
    other.upload(SCENE)
    assert "moon" in text(other.send("/ask", QUESTION.encode())[-1]["answer"])


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def started() -> Iterator[Callable[..., Any]]:
    """`started(*arguments)`: `omni app` in this process, which is left as it was."""
    before = signal.getsignal(signal.SIGTERM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield lambda *arguments: CliRunner().invoke(app, ["app", "--port", str(port), *arguments])
    signal.signal(signal.SIGTERM, before)


def refused(done: Any) -> str:
    """The one sentence with which the command ended."""
    assert done.exit_code == 2, done.output
    assert len(done.stderr.splitlines()) == 1
    return str(done.stderr)


def test_an_address_in_use_is_reported(started: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"No page can be served at host '127.0.0.1', port {port}" in refused(started("--port", str(port)))


@pytest.mark.parametrize(
    "host",
    [
        "a..b",
        "a" * 70,
        "é" * 70,
        "1.2.3.4.5",
        "300.0.0.1",
        "nobody.invalid",
        "[::1]",
        "::g",
        "a b",
        "\udc80",
        "http://localhost",
    ],
)
def test_an_unknown_host_is_reported(started: Any, host: str) -> None:
    assert "No page can be served at host" in refused(started("--host", host))


@pytest.mark.parametrize("host", ["", " "])
def test_no_host_is_not_every_network(started: Any, host: str) -> None:
    assert "The host is empty" in refused(started("checkpoints/vision_tiny", "--host", host))


@pytest.mark.parametrize(
    ("host", "where"),
    [
        ("127.0.0.1", "at http://127.0.0.1:{port}, for this machine alone"),
        ("localhost", "at http://localhost:{port}, for this machine alone"),
        ("0.0.0.0", "at http://localhost:{port}, and by any address of this machine for everybody on its networks"),
        ("0", "at http://localhost:{port}, and by any address of this machine for everybody on its networks"),
    ],
)
def test_it_says_who_can_reach_it(started: Any, host: str, where: str) -> None:
    pytest.importorskip("uvicorn")
    said, mistake = started("checkpoints/vision_tiny", "--host", host).stderr.splitlines()
    assert where.format(port=re.search(r":(\d+)", said)[1]) in said
    assert "does not answer questions" in mistake


def test_without_a_server_the_extra_is_named(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'omni-thinker[app]'" in refused(started())


def test_a_checkpoint_that_cannot_answer_is_told(started: Any) -> None:
    pytest.importorskip("uvicorn")
    done = started("checkpoints/vision_tiny")
    assert done.exit_code == 2
    assert "does not answer questions" in done.stderr
