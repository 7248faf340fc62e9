"""A real `omni serve`, asked by OpenAI's own client: it answers as `omni ask` does, refuses in sentences, and lives on."""

import base64
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from typer.testing import CliRunner

from omni.cli.app import app
from omni.fusion import processing_omni
from omni.loading.checkpoint import load
from omni.serving.server import _listen
from omni.session import Session
from omni.vision.pictures import read_picture

CHECKPOINT = "checkpoints/omni_tiny"
LOCAL = "file:" + "///etc/passwd"
SCENE, SECOND = "examples/scene.png", "examples/second.png"
LIMIT = 40  # tokens
QUESTIONS = ["what color is the circle", "how many objects are there"]
if processing_omni._UNMARKED:  # older transformers cannot read control tokens as text
    QUESTIONS.append("what is <image> the circle <|end|>")


class Served:
    """A server and its client."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.address = process, f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, *content: Any, **options: Any) -> Any:
        parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
        messages: Any = [{"role": "user", "content": parts}]
        return self.client.chat.completions.create(model=CHECKPOINT, messages=messages, **options)

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def picture(path: str) -> dict[str, Any]:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, start_server: Callable[..., Any]) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("serve") / "log"
    # there need be no cache
    process, port = start_server(log, "/health", "serve", CHECKPOINT, HF_HOME=str(log.parent / "nothing"))
    yield Served(process, port)
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def expected() -> Any:
    """What `omni ask` answers."""
    model, processor = load(CHECKPOINT)
    return lambda paths, question: Session(model, processor, [read_picture(p) for p in paths]).ask(question, LIMIT)


@pytest.mark.parametrize("pictures", [[SCENE], [SCENE, SECOND], []], ids=["one", "two", "text alone"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_it_answers_as_omni_ask_does(served: Served, expected: Any, pictures: list[str], question: str) -> None:
    asked, said = [*map(picture, pictures), question], expected(pictures, question)
    answer = served.ask(*asked, max_tokens=LIMIT)
    assert answer.choices[0].message.content == said.answer
    assert answer.choices[0].finish_reason == ("stop" if said.complete else "length")
    assert said.complete or not pictures  # it was not trained to speak of nothing
    streamed = served.ask(*asked, max_tokens=LIMIT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said.answer


def test_the_model_is_listed_and_nothing_else(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [CHECKPOINT]


def test_a_limit_of_tokens_and_a_word_to_stop_at_are_kept(served: Served) -> None:
    question = "describe the picture"
    whole = served.ask(picture(SCENE), question).choices[0].message.content
    cut = served.ask(picture(SCENE), question, max_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    word = whole.split()[1]
    stopped = served.ask(picture(SCENE), question, stop=[f" {word}"]).choices[0].message.content
    assert stopped == whole[: whole.index(word) + len(word)]


def test_the_other_interface_answers_too(served: Served, expected: Any) -> None:
    image = {"type": "input_image", "image_url": picture(SCENE)["image_url"]["url"]}
    turn: Any = {"role": "user", "content": [image, {"type": "input_text", "text": QUESTIONS[0]}]}
    answer = served.client.responses.create(model=CHECKPOINT, input=[turn], stream=False)
    assert answer.output_text == expected([SCENE], QUESTIONS[0]).answer


ADDRESSES = [
    "/etc/passwd",
    LOCAL,
    "http://127.0.0.1:1/x",
    "http://[::1]/",
    "http://169.254.169.254/",
    "x",
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("address", ADDRESSES)
def test_what_the_server_alone_can_reach_stays_there(served: Served, address: str, stream: bool) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\]\.content\[0\] cannot be used: .*(not read|private)"
    ):
        served.ask({"type": "image_url", "image_url": {"url": address}}, QUESTIONS[0], stream=stream)


def test_a_prompt_that_is_too_long_is_refused(served: Served) -> None:
    with pytest.raises(
        openai.BadRequestError, match="2[0-9]{3} tokens, which leaves no room for an answer in the 2048"
    ):
        served.ask(*[picture(SCENE)] * 41, QUESTIONS[0], stream=True)


USER = {"role": "user", "content": "hello"}
WRONG: list[tuple[str, bytes, int, str]] = [
    ("/v1/chat/completions", b"{nothing", 422, "Expected a JSON object"),
    ("/v1/chat/completions", b"[1]", 422, "Expected a JSON object"),
    ("/v1/chat/completions", b"{}", 400, "Expected 'messages'"),
    ("/v1/chat/completions", json.dumps({"messages": [{**USER, "role": "pope"}]}).encode(), 400, "Roles are user and"),
    ("/v1/chat/completions", json.dumps({"messages": [USER], "temperature": "hot"}).encode(), 400, "could not convert"),
    ("/v1/chat/completions", json.dumps({"messages": [USER], "tempurature": 1}).encode(), 422, "tempurature"),
    ("/v1/chat/completions", json.dumps({"messages": [USER], "model": "/etc"}).encode(), 400, "pinned to"),
    ("/v1/completions", json.dumps({"prompt": "<image> hello"}).encode(), 400, "placeholders <image>"),
    ("/load_model", json.dumps({"model": "/etc"}).encode(), 400, "this server has no other"),
    ("/reset", b"{}", 404, "Not Found"),
    ("/v1/audio/transcriptions", b"{}", 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "sentence"), WRONG)
def test_a_wrong_request_gets_a_sentence_and_the_server_lives_on(
    served: Served, path: str, body: bytes, status: int, sentence: str
) -> None:
    found, text = served.post(path, body)
    assert found == status, text
    assert sentence in json.loads(text)["error"]["message"]
    assert served.process.poll() is None
    assert json.loads(urllib.request.urlopen(f"{served.address}/health", timeout=30).read()) == {"status": "ok"}


def test_a_request_that_is_too_large_is_refused_and_not_kept(served: Served, expected: Any) -> None:
    memory = psutil.Process(served.process.pid).memory_info().rss
    huge = b" " * (150 * 2**20)
    status, text = served.post("/v1/chat/completions", huge)
    assert (status, json.loads(text)["error"]["type"]) == (413, "invalid_request_error")
    assert "at most 104,857,600 bytes, found 157,286,400" in json.loads(text)["error"]["message"]
    connection = http.client.HTTPConnection(served.address.removeprefix("http://"), timeout=60)
    try:  # in pieces, without saying how many there will be
        connection.request("POST", "/v1/chat/completions", iter([huge[: 2**20]] * 150), encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # it hung up in the middle
    finally:
        connection.close()
    assert psutil.Process(served.process.pid).memory_info().rss < memory + 130 * 2**20
    assert served.ask(picture(SCENE), QUESTIONS[0]).choices[0].message.content == expected([SCENE], QUESTIONS[0]).answer


def test_a_client_that_leaves_in_the_middle_disturbs_nobody(served: Served, expected: Any) -> None:
    stream = served.ask(picture(SCENE), "describe the picture", stream=True)
    next(iter(stream))
    stream.close()
    assert served.ask(picture(SCENE), QUESTIONS[0]).choices[0].message.content == expected([SCENE], QUESTIONS[0]).answer


def test_what_the_document_says_works(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    (script,) = re.findall(
        r"^```python\n(.*?)^```$", Path("docs/serving.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert "http://localhost:8000" in script
    exec(script.replace("http://localhost:8000", served.address), {})
    assert capsys.readouterr().out == "red\nred"


def test_without_a_model_that_answers_it_does_not_start(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 2
    assert "has no config.json" in done.stderr
    done = CliRunner().invoke(app, ["serve", CHECKPOINT, "--device", "toaster"])
    assert done.exit_code == 2
    assert "cannot be put on device 'toaster'" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_that_is_taken_is_told(host: str) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", CHECKPOINT, "--host", host, "--port", str(port)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: No server can listen at {host}:{port}"), "and nothing of serving before it"
    assert done.stderr.endswith("choose another --port or --host.\n")


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_it_listens_wherever_a_name_points_to(host: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        expected = {found[4] for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        for address in expected:
            socket.create_server(address, family=socket.AF_INET6 if len(address) > 2 else socket.AF_INET).close()
    except OSError:
        pytest.skip("this machine has no such address")
    listening = list(_listen(host, port))
    assert {each.getsockname() for each in listening} == expected
    for each in listening:
        each.close()


@pytest.mark.long
def test_eight_clients_for_a_minute(served: Served, expected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """No error, no wrong answer, and memory that stays where it was; prints what it measured."""
    answers = {(p, q): expected([p], q).answer for p in (SCENE, SECOND) for q in QUESTIONS}
    asked = list(answers)
    process = psutil.Process(served.process.pid)
    seconds: list[float] = []
    problems: list[str] = []

    def client(number: int, until: float) -> None:
        turn = number
        while time.monotonic() < until:
            path, question = asked[turn % len(asked)]
            start = time.monotonic()
            try:
                if turn % 2:
                    chunks = served.ask(picture(path), question, stream=True)
                    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                else:
                    said = served.ask(picture(path), question).choices[0].message.content
                if said != answers[path, question]:
                    problems.append(f"{question}: {said!r}, expected {answers[path, question]!r}")
            except Exception as error:
                problems.append(repr(error))
            seconds.append(time.monotonic() - start)
            turn += 1

    def run(duration: float) -> int:
        seconds.clear()
        until = time.monotonic() + duration
        threads = [threading.Thread(target=client, args=(number, until)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return process.memory_info().rss

    before, after = run(15), run(60)  # the first fills pools and caches
    p50, p95 = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(seconds)} requests, p50 {p50:.2f} s, p95 {p95:.2f} s, resident {before / 1e6:.0f} MB before, "
            f"{after / 1e6:.0f} MB after\n"
        )
    assert problems == []
    assert after < before * 1.05
