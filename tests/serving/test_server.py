"""A real `omni serve`, asked by OpenAI's own client: it answers as `omni ask` does, refuses in sentences, and lives on."""

import base64
import http.client
import json
import re
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
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
NAME = "omni_tiny"
LOCAL = "file:" + "///etc/passwd"
SCENE, SECOND = "examples/scene.png", "examples/second.png"
LIMIT = 40  # tokens
GOING_ON: Any = {"1": -100}
"""No end of an answer."""
QUESTIONS = ["what color is the circle", "how many objects are there"]
if processing_omni.UNMARKED:  # older transformers cannot read control tokens as text
    QUESTIONS.append("what is <image> the circle <|end|>")


class Served:
    """A server and its client."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.address = process, f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, *content: Any, **options: Any) -> Any:
        parts = [{"type": "text", "text": each} if isinstance(each, str) else each for each in content]
        messages: Any = [{"role": "user", "content": parts}]
        return self.client.chat.completions.create(messages=messages, **{"model": NAME, **options})

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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, start_server: Callable[..., Any]) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("serve") / "log"
    # there need be no cache
    process, port = start_server(
        log, "/health", "serve", CHECKPOINT, "--allowed-host", "omni.example", HF_HOME=str(log.parent / "nothing")
    )
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


def test_the_model_is_listed_by_its_name_and_known_by_its_folder_too(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [NAME]
    for name in (NAME, CHECKPOINT):
        assert served.client.models.retrieve(name).id == NAME
        assert served.ask("hello", model=name, max_tokens=1).model == NAME
    with pytest.raises(openai.NotFoundError, match="Expected the model 'omni_tiny', found 'gpt-5'"):
        served.client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError, match="this server has no other"):
        served.ask("hello", model="gpt-5")


def test_loading_the_model_that_is_there_is_done(served: Served) -> None:
    """`transformers chat` begins with it."""
    status, text = served.post("/load_model", json.dumps({"model": NAME}).encode())
    assert (status, json.loads(text.removeprefix("data: "))) == (200, {"status": "ready", "cached": True})


def test_a_limit_of_tokens_and_a_word_to_stop_at_are_kept(served: Served) -> None:
    question = "describe the picture"
    whole = served.ask(picture(SCENE), question).choices[0].message.content
    cut = served.ask(picture(SCENE), question, max_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    word = whole.split()[1]
    stopped = served.ask(picture(SCENE), question, stop=f" {word}").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole[: whole.index(word) - 1], "stop")
    streamed = served.ask(picture(SCENE), question, stop=[f" {word}"], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == stopped.message.content


PLAIN: dict[str, dict[str, Any]] = {
    "empty lists": {"stop": [], "logit_bias": {}, "tools": []},
    "a bias": {"logit_bias": {"5": -100}},
    "text alone": {"response_format": {"type": "text"}, "modalities": ["text"], "n": 1},
    "notes of the client": {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "seed": 1},
    "no temperature": {"temperature": 0, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0},
    "an author": {"extra_body": {"safety_identifier": "me", "prompt_cache_key": "you"}},
    "tools that are not called": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "none",
    },
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_ordinary_clients_add_is_taken(served: Served, kind: str) -> None:
    assert served.ask(picture(SCENE), QUESTIONS[0], **PLAIN[kind]).choices[0].message.content == "red"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a tool that must be called": ({"tool_choice": "required"}, "In 'tool_choice': this server can follow"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "this server calls no tools"),
    "JSON": ({"response_format": {"type": "json_object"}}, "In 'response_format': this server can follow"),
    "two answers": ({"n": 2}, "In 'n': this server can follow 1 alone, found '2'"),
    "beams": ({"extra_body": {"generation_config": '{"num_beams": 100000}'}}, "know 'generation_config.num_beams'"),
    "many texts to stop at": ({"stop": ["x" * 1000] * 300}, "In 'stop.0.': string should have at most 100 characters"),
    "half a letter": ({"extra_body": {"user": "\ud800"}}, "both halves of a character"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", REFUSED)
def test_what_cannot_be_followed_is_refused(served: Served, wish: str, stream: bool) -> None:
    options, sentence = REFUSED[wish]
    if wish == "half a letter":  # which the client itself would not write
        body = {"messages": [USER], "stream": stream, **options["extra_body"]}
        status, text = served.post("/v1/chat/completions", json.dumps(body).encode())
        assert (status, sentence in json.loads(text)["error"]["message"]) == (400, True)
        return
    with pytest.raises(openai.BadRequestError, match=sentence):
        served.ask(QUESTIONS[0], stream=stream, **options)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_is_taken(served: Served, role: str) -> None:
    messages: Any = [
        {"role": role, "content": "You are helpful."},
        {"role": "user", "content": [picture(SCENE), {"type": "text", "text": QUESTIONS[0]}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    answer = served.client.chat.completions.create(model=NAME, messages=messages[:2])
    assert answer.choices[0].message.content == "red"
    messages[2] = answer.choices[0].message  # as a client sends it back
    assert served.client.chat.completions.create(model=NAME, messages=messages).choices[0].message.content


def test_base64_may_be_broken_into_lines(served: Served) -> None:
    lines = "data:image/png;base64," + base64.encodebytes(Path(SCENE).read_bytes()).decode()
    answer = served.ask({"type": "image_url", "image_url": {"url": lines, "detail": "high"}}, QUESTIONS[0])
    assert answer.choices[0].message.content == "red"


def test_probabilities_come_with_the_tokens(served: Served) -> None:
    asked: Any = {"logprobs": True, "top_logprobs": 3}
    choice = served.ask(picture(SCENE), QUESTIONS[0], **asked).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content == "red"
    assert all(bytes(token.bytes).decode() == token.token for token in tokens)
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token  # it answers greedily
        assert 0 >= token.logprob == token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
    streamed = [chunk.choices[0] for chunk in served.ask(picture(SCENE), QUESTIONS[0], stream=True, **asked)]
    assert [token for each in streamed if each.logprobs for token in each.logprobs.content] == tokens
    assert served.ask("hello", max_tokens=1).choices[0].logprobs is None

    plain = served.client.completions.create(
        model=NAME, prompt="hello", max_tokens=3, logprobs=2, logit_bias=GOING_ON
    ).choices[0]
    assert "".join(plain.logprobs.tokens) == plain.text
    assert [len(each) for each in plain.logprobs.top_logprobs] == [2, 2, 2]
    starts = [0, len(plain.logprobs.tokens[0]), len(plain.logprobs.tokens[0] + plain.logprobs.tokens[1])]
    assert plain.logprobs.text_offset == starts

    said = served.client.responses.create(
        model=NAME, input="hello", max_output_tokens=2, top_logprobs=1, include=["message.output_text.logprobs"]
    )
    (part,) = said.output[0].content
    assert "".join(token.token for token in part.logprobs) == part.text == said.output_text


def test_a_stream_says_what_it_used_if_asked(served: Served) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 3, "logit_bias": GOING_ON}
    *chunks, last = served.ask("hello", **options)
    assert (last.choices, last.usage.completion_tokens) == ([], 3)
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    *plain, last = served.client.completions.create(model=NAME, prompt="hello", **options)
    assert (last.choices, last.usage.completion_tokens) == ([], 3)
    whole = served.client.completions.create(model=NAME, prompt=["hello"], max_tokens=3, logit_bias=GOING_ON).choices[0]
    assert "".join(chunk.choices[0].text for chunk in plain) == whole.text
    status, text = served.post("/v1/chat/completions", json.dumps({"messages": [USER], "stream": True}).encode())
    assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)


def test_the_other_interface_answers_too(served: Served, expected: Any) -> None:
    image = {"type": "input_image", "image_url": picture(SCENE)["image_url"]["url"]}
    turn: Any = {"role": "user", "content": [image, {"type": "input_text", "text": QUESTIONS[0]}]}
    said = expected([SCENE], QUESTIONS[0]).answer
    answer = served.client.responses.create(model=NAME, input=[turn])
    assert (answer.output_text, answer.status) == (said, "completed")
    with served.client.responses.stream(model=NAME, input=[turn]) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert ("".join(deltas), final.output_text, final.usage) == (said, said, answer.usage)
    again = served.client.responses.create(
        model=NAME, input=[turn, *answer.output, {"role": "user", "content": QUESTIONS[1]}], max_output_tokens=1
    )
    assert (again.status, again.incomplete_details.reason) == ("incomplete", "max_output_tokens")


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
        openai.BadRequestError, match="2,0[0-9]{2} tokens, which leaves no room for an answer in the 2,048"
    ):
        served.ask(*[picture(SCENE)] * 41, QUESTIONS[0], stream=True)


USER = {"role": "user", "content": "hello"}
WRONG: list[tuple[str, bytes, int, str]] = [
    ("/v1/chat/completions", b"{nothing", 400, "Expected a JSON object"),
    ("/v1/chat/completions", b"[1]", 400, "In the body of the request: it should be an object"),
    ("/v1/chat/completions", b"{}", 400, "Expected 'messages'"),
    ("/v1/chat/completions", b"[" * 10_000, 400, "recursion limit exceeded"),
    ("/v1/chat/completions", json.dumps({"messages": [{**USER, "role": "pope"}]}).encode(), 400, "found 'pope'"),
    ("/v1/chat/completions", json.dumps({"messages": [USER], "temperature": "hot"}).encode(), 400, "found 'hot'"),
    ("/v1/chat/completions", json.dumps({"messages": [USER], "tempurature": 1}).encode(), 400, "tempurature"),
    ("/v1/chat/completions", json.dumps({"messages": [USER], "model": "/etc"}).encode(), 404, "has no other"),
    ("/v1/completions", json.dumps({"prompt": "<image> hello"}).encode(), 400, "the placeholder <image>"),
    ("/v1/completions", json.dumps({"prompt": ""}).encode(), 400, "The prompt is empty"),
    (
        "/v1/completions",
        json.dumps({"prompt": "a" * 5_000_000}).encode(),
        400,
        "5,000,000 bytes, expected at most",
    ),
    ("/load_model", json.dumps({"model": "/etc"}).encode(), 404, "this server has no other"),
    ("/reset", b"{}", 404, "This server has nothing at '/reset' for POST."),
    ("/health", b"{}", 405, "nothing at '/health' for POST."),
    ("/v1/audio/transcriptions", b"{}", 404, "This server has nothing at"),
    ("/openapi.json", b"{}", 404, "This server has nothing at"),
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
    assert "at most 52,428,800 bytes, found 157,286,400" in json.loads(text)["error"]["message"]
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


@pytest.mark.parametrize("stream", [False, True])
def test_no_work_is_done_for_clients_that_leave(served: Served, expected: Any, stream: bool) -> None:
    """Thirty answers as long as the model can write take minutes; the next client does not wait for them."""
    body = {"messages": [USER], "max_tokens": 2000, "logit_bias": {"1": -100}, "stream": stream}
    leaving = []
    for _ in range(30):
        connection = http.client.HTTPConnection(served.address.removeprefix("http://"), timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        leaving.append(connection)
    if stream:
        assert leaving[0].getresponse().readline().startswith(b"data: ")
    for connection in leaving:
        connection.close()
    answer = served.client.with_options(timeout=20).chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": [picture(SCENE), {"type": "text", "text": QUESTIONS[0]}]}]
    )
    assert answer.choices[0].message.content == expected([SCENE], QUESTIONS[0]).answer


def test_a_foreign_name_and_a_foreign_page_are_refused(served: Served) -> None:
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{served.address}/v1/models", headers=headers), timeout=30)
        assert refused.value.code == 403
    headers = {"Host": "omni.example"}  # as it was started
    assert (
        urllib.request.urlopen(urllib.request.Request(f"{served.address}/health", headers=headers), timeout=30).status
        == 200
    )


def test_what_the_document_says_works(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = re.findall(
        r"^```python\n(.*?)^```$", Path("docs/serving.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    assert "http://localhost:8000" in scripts[0]
    exec("".join(scripts).replace("http://localhost:8000", served.address), {})
    assert capsys.readouterr().out == "red\nred128\n"


def test_without_a_model_that_answers_it_does_not_start(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 2
    assert "has no config.json" in done.stderr
    for device in ("toaster", "meta"):  # of which one has no weights
        done = CliRunner().invoke(app, ["serve", CHECKPOINT, "--port", str(free_port()), "--device", device])
        assert done.exit_code == 2
        assert f"The model cannot answer on device '{device}'" in done.stderr
    done = CliRunner().invoke(app, ["serve", CHECKPOINT, "--host", ""])
    assert done.exit_code == 2
    assert "Expected a --host to listen at, found an empty one" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_in_use_is_reported(host: str) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", CHECKPOINT, "--host", host, "--port", str(port)])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"Error: No server can listen at {host}:{port}"), "and nothing of serving before it"
    assert done.stderr.endswith("choose another --port or --host.\n")


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_it_listens_wherever_a_name_points_to(host: str) -> None:
    port = free_port()
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


def bomb(width: int, height: int) -> dict[str, Any]:
    """A picture of a few kilobytes that says it is large, and is."""
    row = zlib.compressobj(9)
    data = b"".join(row.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + row.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png).decode()}}


@pytest.mark.long
def test_sixteen_clients_for_a_minute_beside_hostile_ones(
    served: Served, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """No error, no wrong answer, and memory that stays where it was; prints what it measured."""
    answers = {(p, q): expected([p], q).answer for p in (SCENE, SECOND) for q in QUESTIONS}
    asked = list(answers)
    process = psutil.Process(served.process.pid)
    seconds: list[float] = []
    problems: list[str] = []
    hostile: list[int] = []
    large, endless = bomb(7070, 7070), {"max_tokens": 2000, "logit_bias": {"1": -100}}

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

    def chat(*content: Any, **fields: Any) -> bytes:
        return json.dumps({"messages": [{"role": "user", "content": list(content)}], **fields}).encode()

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    bodies = [
        chat(text("hello"), stop=["x" * 1000] * 300),
        chat(text("hello"), generation_config='{"num_beams": 100000}'),
        chat(*[large] * 12),
        chat(large, max_tokens=1),
        chat(text("x" * (45 * 2**20))),
        chat(text("hello"), **{f"field{i}": i for i in range(60_000)}),
        b"[" * 1_000_000,
    ]

    def attack(number: int, until: float) -> None:
        while time.monotonic() < until:
            body = bodies[number % len(bodies)]
            with suppress(OSError):
                hostile.append(served.post("/v1/chat/completions", body)[0])
            with suppress(OSError), socket.create_connection(("127.0.0.1", int(served.address[-5:]))) as leaving:
                leaving.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
                if number % 2:
                    body = chat(text("hello"), **endless)
                    leaving.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                time.sleep(0.2)
            number += 1

    def run(duration: float) -> int:
        seconds.clear()
        until = time.monotonic() + duration
        threads = [threading.Thread(target=client, args=(number, until)) for number in range(16)]
        threads += [threading.Thread(target=attack, args=(number, until)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return process.memory_info().rss

    before, after = run(20), run(60)  # the first fills pools and caches
    p50, p95 = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(seconds)} requests, p50 {p50:.2f} s, p95 {p95:.2f} s, resident {before / 1e6:.0f} MB before, "
            f"{after / 1e6:.0f} MB after, {len(hostile)} hostile ones: {sorted(set(hostile))}\n"
        )
    assert problems == []
    assert set(hostile) <= {200, 400}
    assert after < before * 1.1
