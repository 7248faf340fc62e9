"""The page by HTTP, without a browser."""

import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from html import unescape
from typing import Any

import pytest
from typer.testing import CliRunner

from omni.cli.app import app

SCENE, QUESTION = "examples/scene.png", "what is below the heart"


@pytest.fixture(scope="module")
def program(served: Any) -> Iterator[Any]:
    from gradio_client import Client

    running = Client(served.address, verbose=False, analytics_enabled=False)
    yield running
    running.close()


@pytest.fixture
def client(program: Any) -> Any:
    """A visitor that is a program, and new to the page."""
    program.reset_session()
    return program


def text(html: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", html))


def choose(client: Any, *paths: Any) -> Any:
    """What the page shows then: pictures, answer, what went wrong."""
    from gradio_client import handle_file

    return client.predict([handle_file(str(path)) for path in paths], False, api_name="/choose")[1:]


def test_it_answers_as_omni_ask_does(client: Any, expected: Any) -> None:
    pictures, _, wrong = choose(client, SCENE)
    assert (pictures.count("<img"), wrong) == (1, "")
    job = client.submit(QUESTION, api_name="/ask")
    *_, last = [job.result()[1], *(output[1] for output in job.outputs())]
    found = expected(QUESTION, SCENE)
    assert re.findall(r"<button data-word[^>]*>(.*?)</button>", last) == list(found.words)
    assert f"{found.answer.tokens_read} tokens read, {found.answer.tokens_written} written" in text(last)


def test_what_is_wrong_is_said_in_the_words_of_the_library(client: Any, damaged: Any) -> None:
    for path, sentence in damaged.items():
        assert text(choose(client, path)[2]) == sentence
    assert "There is no picture yet" in text(client.predict(QUESTION, api_name="/ask")[2])
    choose(client, SCENE, *damaged)  # what can be read is taken
    assert "The question is empty" in text(client.predict(" ", api_name="/ask")[2])
    assert "moon" in text(client.predict(QUESTION, api_name="/ask")[1])


def test_a_browser_may_load_nothing_from_elsewhere(served: Any) -> None:
    with urllib.request.urlopen(served.address) as response:
        policy = response.headers["Content-Security-Policy"]
    sources = {source for rule in policy.split(";") for source in rule.split()[1:]}
    assert sources == {"'self'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:"}
    assert served.sent == []


@pytest.mark.parametrize("path", ["pyproject.toml", "/etc/passwd", "checkpoints/omni_tiny/config.json"])
def test_files_of_the_machine_stay_there(served: Any, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{served.address}/gradio_api/file={path}")
    assert error.value.code in (403, 404)


# --- The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """`started(*arguments)`: `omni app` in this process, which is left as it was."""
    before = signal.getsignal(signal.SIGTERM)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield lambda *arguments: CliRunner().invoke(app, ["app", "--port", str(port), *arguments])
    signal.signal(signal.SIGTERM, before)


def test_an_address_that_is_taken_is_told(started: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = started("--port", str(port))
    assert done.exit_code == 2
    assert f"No page can be served at 127.0.0.1:{port}" in done.stderr


def test_without_gradio_the_extra_is_named(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "omni.app.page", raising=False)
    done = started()
    assert done.exit_code == 2
    assert "pip install 'omni-thinker[app]'" in done.stderr


def test_a_checkpoint_that_cannot_answer_is_told(started: Any) -> None:
    pytest.importorskip("gradio")
    done = started("checkpoints/vision_tiny")
    assert done.exit_code == 2
    assert "does not answer questions" in done.stderr
