"""Odd requests to `omni serve` and to the page of `omni app`: two processes with a model of pictures and sounds.

Bodies hold wrong values, damaged pictures and sounds, and paths and addresses that a client must not name. Clients leave
early, keep silent, and send bytes that are not HTTP. A request may be answered, or refused in a sentence. Failures are: a
status of 500, text from the disk or of another visitor, a traceback in the log, a minute without an answer, a process that
ends or keeps memory, and a different answer to the plain question that is asked in between.
"""

import base64
import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import quote

from campaigns import damage, pictures, shapes, sounds
from campaigns.flips import quiet
from campaigns.tally import Tally

SECONDS = 60
"""A request without an answer for so long hangs."""
KEPT = 2**29
"""The most bytes by which the memory of a process may grow after its first answers."""
BETWEEN = 25
"""The plain question is asked after so many odd requests."""
SECRET = "xyzzy-of-the-disk"


class Said(NamedTuple):
    """An answer. Status 0: the connection was closed without one."""

    status: int
    kind: str
    body: bytes


@dataclass
class Odd:
    """An odd request.

    Attributes:
        leaves: seconds after which the client leaves.
        plain: the request is HTTP, so a refusal is a sentence.
    """

    name: str
    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    leaves: float | None = None
    plain: bool = True


def run(seed: int, count: int, seconds: float) -> Tally:
    """Try `count` requests, or as many as fit into the time."""
    end, draw = time.monotonic() + seconds, random.Random(seed)
    tried = refused = answered = 0
    failures: list[str] = []
    with TemporaryDirectory() as place, quiet(), ExitStack() as stack:
        here = Path(place)
        (here / "secret.txt").write_text(SECRET)
        make_model(here / "model")
        doors = [stack.enter_context(started(door, here)) for door in (Server, Page)]
        files = _files(seed)
        while tried < count and time.monotonic() < end:
            door = draw.choice(doors)
            odd = door.odd(draw, files)
            outcome = door.outcome(odd, door.ask(odd))
            tried += 1
            refused += outcome == "refused"
            answered += outcome == "answered"
            if tried % BETWEEN == 0 or tried == count:
                for each in doors:
                    outcome = each.problem() or outcome
            if outcome not in ("refused", "answered"):
                failures.append(f"requests, seed {seed}, {tried}: {door.name} {odd.name}: {outcome}")
                if not door.lives():
                    break
    return Tally(tried, refused, answered, tuple(failures))


def make_model(folder: Path) -> None:
    """Write a model with random weights that takes pictures and sounds."""
    import torch

    from omni import OmniConfig, OmniFeatureExtractor, OmniForConditionalGeneration, OmniImageProcessor, OmniProcessor
    from omni.training.tokenizer import train_tokenizer

    tokens = {"image": "<image>", "audio": "<audio>"}
    tokenizer = train_tokenizer(["what is that", "a red circle"] * 4, 300, tokens)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoders = {
        "image": {"model_type": "omni_vision", "image_size": 16, "patch_size": 8, **small},
        "audio": {"model_type": "omni_audio", "num_mel_bins": 20, "time_reduction": 8, **small},
    }
    sections = {
        name: {"encoder": encoder, "token_id": tokenizer.convert_tokens_to_ids(tokens[name]), "projector": "mlp"}
        for name, encoder in encoders.items()
    }
    text = {"model_type": "qwen3", "vocab_size": len(tokenizer), "max_position_embeddings": 2048, "head_dim": 16}
    text |= {**small, "num_key_value_heads": 1, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(
        OmniConfig(modalities=sections, text_config={**text, "pad_token_id": tokenizer.pad_token_id})
    )
    model.save_pretrained(folder)
    preprocessors = {
        "image": OmniImageProcessor(size={"height": 16, "width": 16}),
        "audio": OmniFeatureExtractor(num_mel_bins=20),
    }
    OmniProcessor(
        tokenizer=tokenizer, preprocessors=preprocessors, modalities=model.config.modalities, prompt="what is that"
    ).save_pretrained(folder)


def _files(seed: int) -> Iterator[tuple[str, bytes]]:
    """Pictures and sounds, whole and damaged, each with its media type."""
    kinds: list[tuple[str, dict[str, bytes], dict[str, bytes]]] = [
        ("image", pictures.drawings(), pictures.ENDS),
        ("audio", sounds.recordings(), {}),
    ]
    made = [(f"{kind}/{{}}", damage.mutants(files, ends, seed)) for kind, files, ends in kinds]
    while True:
        for kind, mutants in made:
            mutant = next(mutants)
            yield kind.format(mutant.name.split()[1].strip(",")), mutant.data
            yield kind.format(mutant.name.split()[1].strip(",")), mutant.whole


# --- Processes --------------------------------------------------------------------------------------------------------


class Door:
    """A process that answers requests, and the requests that are sent to it."""

    name = ""

    def __init__(self, process: subprocess.Popen[bytes], port: int, here: Path) -> None:
        self.process, self.port, self.here = process, port, here
        self.log = here / f"{self.name}.log"
        for _ in range(3):  # the first answers fill pools and caches
            self.expected = self.plain()
        self.held = self._resident()

    def odd(self, draw: random.Random, files: Iterator[tuple[str, bytes]]) -> Odd:
        """Draw an odd request."""
        raise NotImplementedError

    def plain(self) -> bytes:
        """The answer to an ordinary request."""
        raise NotImplementedError

    def lives(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

    def problem(self) -> str:
        """What is wrong with the process; empty if nothing is."""
        if not self.lives():
            return f"it has ended with status {self.process.returncode}"
        try:
            if (said := self.plain()) != self.expected:
                return f"the plain question gets a different answer, {said[:200]!r} and not {self.expected[:200]!r}"
        except OSError as error:
            return f"the plain question gets no answer: {error!r}"
        if (held := self._resident()) > self.held + KEPT:
            return f"it holds {held:,} bytes, {self.held:,} before"
        written = self.log.read_text(errors="replace")
        if "Traceback" in written:
            self.log.write_text("")
            return f"its log: {written[written.rindex('Traceback') :][-600:]}"
        return ""

    def _resident(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def ask(self, odd: Odd) -> Said | Exception:
        """The answer to a request, or the error of the connection."""
        try:
            return self._send(odd) if odd.plain else self._send_raw(odd)
        except (OSError, http.client.HTTPException) as error:
            return error

    def _send(self, odd: Odd) -> Said:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=odd.leaves or SECONDS)
        try:
            connection.putrequest(odd.method, odd.path, skip_host="Host" in odd.headers)
            length = {} if "Content-Length" in odd.headers else {"Content-Length": str(len(odd.body))}
            for header, value in {**length, **odd.headers}.items():
                connection.putheader(header, value.encode("utf-8", "surrogatepass"))
            connection.endheaders(odd.body)
            answer = connection.getresponse()
            return Said(answer.status, answer.getheader("content-type", ""), answer.read())
        finally:
            connection.close()

    def _send_raw(self, odd: Odd) -> Said:
        with socket.create_connection(("127.0.0.1", self.port), timeout=odd.leaves or SECONDS) as raw:
            raw.sendall(odd.body)
            with suppress(OSError):
                raw.shutdown(socket.SHUT_WR)
            said = b""
            while more := raw.recv(65536):
                said += more
        found = re.match(rb"HTTP/1\.1 (\d+)", said)
        return Said(int(found[1]) if found else 0, "", said)

    def outcome(self, odd: Odd, said: Said | Exception) -> str:
        """The outcome of a request: "answered", "refused", or what is wrong."""
        if isinstance(said, Exception):
            gone = (
                odd.leaves is not None or not odd.plain or isinstance(said, ConnectionError | http.client.HTTPException)
            )
            return "refused" if gone else f"no answer: {said!r}"
        if SECRET.encode() in said.body or base64.b64encode(SECRET.encode())[:12] in said.body:
            return "the answer shows a file of the disk"
        if said.status >= 500 and said.status != 503:
            return f"status {said.status}: {said.body[:200]!r}"
        if said.status < 400:
            return "answered" if said.status else "refused"
        sentence = self.sentence(said)
        if odd.plain and not re.fullmatch(r"[^\n]+[.)]", sentence or ""):
            return f"status {said.status} without a sentence: {said.body[:200]!r}"
        return "refused"

    def sentence(self, said: Said) -> str | None:
        """The sentence of a refusal; None if the answer has none."""
        raise NotImplementedError


@contextmanager
def started(door: type[Door], here: Path) -> Iterator[Door]:
    """Start a process that serves the model `here / "model"`, and end it after the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "omni", door.name, "model", "--host", "127.0.0.1", "--port", str(port)]
    with (here / f"{door.name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=here, env=_environment())
    try:
        until = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < until:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            time.sleep(0.2)
        yield door(process, port, here)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


# --- What is sent -----------------------------------------------------------------------------------------------------

Draw = random.Random
VALUES: list[Any] = [
    *shapes.VALUES,
    "x" * 200_000,
    ["x" * 1000] * 300,
    [[]] * 5000,
    {str(number): 0 for number in range(5000)},
    "\x00",
    "<image>",
    "<audio>" * 50,
    "\u202e" * 9,
    -0.0,
    2**63,
    -(2**63) - 1,
    10**400,
    "1",
    "true",
    [None],
    {"type": "text"},
]
HEADERS = [
    {"Host": "evil.example"},
    {"Host": "169.254.169.254"},
    {"Host": "[::1"},
    {"Host": ""},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "x" * 5000},
    {"Content-Length": "-1"},
    {"Content-Length": "99999999999"},
    {"Content-Length": "3"},
    {"Transfer-Encoding": "chunked"},
    {"Expect": "100-continue"},
    {"Content-Encoding": "gzip"},
    {"X-" + "y" * 60: "z" * 60_000},
    {"Accept": "\udcff"},
    {"Upgrade": "websocket"},
    {"Visit": "x" * 5000},
    {"Authorization": "Bearer \udcff"},
    {"Range": "bytes=0-"},
    {"Connection": "close, x"},
]
RAW = [
    b"",
    b"\n",
    b"\0" * 300,
    b"GET",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
    b"GET / HTTP/1.1\r\n" * 50,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{",
    b"A" * 100_000,
    b"POST /ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9000,
    b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


def _bodies(draw: Draw, values: Any) -> bytes:
    """JSON, mostly with wrong values; some of it is cut, or is not JSON."""
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        places = [*shapes.paths(values)]
        if places:
            value = draw.choice([*VALUES, shapes.GONE])
            values = shapes.changed(values, draw.choice(places), value)
    if draw.random() < 0.1:
        key = draw.choice(
            ("path", "file", "n", "stop", "x" * 3000, "", "generation_config", "quantization_config", "functions")
        )
        values = {**values, key: draw.choice(VALUES)}
    body = json.dumps(values).encode()
    way = draw.random()
    if way < 0.04:
        return body[: draw.randrange(len(body))]
    if way < 0.06:
        return draw.choice(
            [b"[" * 200_000, b"", b"null", b'"x"', b"\xff\xfe", b"{" * 9, draw.randbytes(300), b"1" * 9000]
        )
    if way < 0.10:
        return damage.flips(body, draw, body)
    return body


def _oddly(draw: Draw, odd: Odd) -> Odd:
    """Give some requests other headers, another method or path, or a client that leaves."""
    if draw.random() < 0.12:
        odd.headers |= draw.choice(HEADERS)
        if "Content-Length" in odd.headers or "Transfer-Encoding" in odd.headers:
            odd.leaves = 1.0  # the server waits for a body that does not come
    if draw.random() < 0.08:
        odd.leaves = draw.choice((0.001, 0.05, 0.5))
    if draw.random() < 0.04:
        odd.method = draw.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"))
    if draw.random() < 0.03:
        odd.path = draw.choice(
            ("/", "//", "/../../etc/passwd", "/v1", "/" + "x" * 3000, "/%00", "/v1/models/" + "%2e%2e/" * 9, "/docs")
        )
    if draw.random() < 0.04:
        odd.plain, odd.body, odd.leaves = False, draw.choice(RAW), 15.0
    odd.name = f"{odd.method} {odd.path[:60]} {odd.headers if odd.headers else ''} {odd.body[:160]!r}"
    return odd


class Server(Door):
    """`omni serve`."""

    name = "serve"
    ROUTES = (
        "/v1/chat/completions",
        "/v1/chat/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/completions",
        "/load_model",
        "/v1/models",
        "/health",
    )

    def odd(self, draw: Draw, files: Iterator[tuple[str, bytes]]) -> Odd:
        """See `Door`."""
        path = draw.choice(self.ROUTES)
        text = {
            "type": "text",
            "text": draw.choice(("what is that", "", "<image>", "x" * 3000, "\ud83d", "a\0b", "\n")),
        }
        content = [*(self._part(draw, files) for _ in range(draw.choice((0, 1, 1, 2, 5)))), text]
        options: dict[str, Any] = {"max_tokens": draw.choice((1, 4)), "stream": draw.random() < 0.3}
        extras: dict[str, Any] = {
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["a", "b"],
            "seed": 1,
            "logit_bias": {"5": 3},
            "logprobs": True,
            "top_logprobs": 2,
            "frequency_penalty": 0.5,
            "generation_config": '{"top_k": 3}',
            "tools": [],
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "chat_template_kwargs": {"x": 1},
            "stream_options": {"include_usage": True},
            "n": 1,
        }
        options |= {key: extras[key] for key in draw.sample(sorted(extras), draw.randrange(4))}
        messages = [
            {"role": draw.choice(("user", "user", "system", "assistant", "developer", "tool")), "content": content}
        ]
        if draw.random() < 0.2:
            messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}, *messages]
        if path == "/v1/completions":
            values: Any = {"prompt": draw.choice(("what", "", "<image>", ["a", "b"], [1, 2], "x" * 9000)), **options}
        elif path == "/v1/responses":
            values = {"input": messages, "max_output_tokens": 3, "stream": options["stream"]}
        else:
            values = {"messages": messages, **options}
        get = path in ("/v1/models", "/health")
        return _oddly(draw, Odd("", "GET" if get else "POST", path, b"" if get else _bodies(draw, values), {}))

    def _part(self, draw: Draw, files: Iterator[tuple[str, bytes]]) -> Any:
        kind, data = next(files)
        encoded = base64.b64encode(data).decode()
        said = draw.choice(
            (kind, kind, kind, "image/png", "audio/wav", "application/octet-stream", "x", "text/html", "audio/*")
        )
        address = f"data:{said};base64,{encoded}"
        if draw.random() < 0.2:
            secret = self.here / "secret.txt"
            address = draw.choice(
                (
                    str(secret),
                    f"file:{2 * '/'}{secret}",
                    f"http://127.0.0.1:{self.port}/health",
                    f"http://localhost:{self.port}/v1/models",
                    "http://[::1]/",
                    "http://169.254.169.254/latest",
                    "http://0x7f.1/",
                    "data:",
                    "data:,",
                    "data:image/png;base64,@",
                    "http://",
                    "https://256.1.1.1/",
                    "ftp://x/y",
                    "x" * 9000,
                    "",
                    "http://192.0.0.192/",
                    "gopher://x",
                    "http://x y/",
                )
            )
        if kind.startswith("audio") and draw.random() < 0.6:
            form = draw.choice(("wav", "mp3", kind.split("/")[1], "x" * 30, "", "../x"))
            return {"type": "input_audio", "input_audio": {"data": encoded, "format": form}}
        name = draw.choice(("image_url", "image_url", "audio_url", "video_url", "file", "input_image", "input_file"))
        if name == "file":
            return {"type": name, "file": {draw.choice(("file_data", "file_url", "file_id")): address}}
        if name in ("input_image", "input_file"):
            return {"type": name, {"input_image": "image_url", "input_file": "file_data"}[name]: address}
        return {"type": name, name: {"url": address}}

    def plain(self) -> bytes:
        """See `Door`."""
        parts = [_uri("image/png", pictures.drawings()["png"]), _uri("audio/wav", sounds.recordings()["wav"])]
        content = [
            *({"type": "image_url", "image_url": {"url": each}} for each in parts),
            {"type": "text", "text": "what"},
        ]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8}
        said = self._send(Odd("", "POST", "/v1/chat/completions", json.dumps(body).encode(), {}))
        return json.dumps(json.loads(said.body).get("choices", said.body.decode())).encode()

    def sentence(self, said: Said) -> str | None:
        """See `Door`."""
        if said.body == b"" or said.kind.startswith("text/plain"):
            return said.body.decode() or "No body."  # of HEAD; or no HTTP
        try:
            found: str = json.loads(said.body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            return None
        return found


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Page(Door):
    """`omni app`."""

    name = "app"

    def __init__(self, *arguments: Any) -> None:
        self.visits: list[str] = []
        self.keys: list[str] = []
        super().__init__(*arguments)

    def odd(self, draw: Draw, files: Iterator[tuple[str, bytes]]) -> Odd:
        """See `Door`."""
        if not self.visits or draw.random() < 0.1:
            self.visits = [*self.visits[-20:], self._post("/visits", b"", "").body.decode()]
        visit = draw.choice([*self.visits[-4:], self.visits[-1], "", "nobody"])
        kind, data = next(files)
        name = draw.choice(
            (
                "a.png",
                "b.wav",
                "",
                "../../secret.txt",
                str(self.here / "secret.txt"),
                "x" * 300,
                "\ud800",
                "<b>",
                "a\nb",
            )
        )
        number = draw.choice(("0", "1", "7", "-1", "9" * 30, "x", "1e3", "%00", "\u0663"))
        ways: list[Callable[[], tuple[str, bytes]]] = [
            lambda: (
                f"/items?name={quote(name, errors='surrogatepass')}&together={draw.choice(('true', 'false', 'x', ''))}",
                data,
            ),
            lambda: (f"/items?name={quote(name, errors='surrogatepass')}&together=true", data),
            lambda: (
                "/ask",
                draw.choice((b"what", b"", b"\xff", b"x" * 3000, b"x" * 20_000, b"<image>", b"\0", "\u202e".encode())),
            ),
            lambda: (f"/remove/{quote(number)}", b""),
            lambda: (f"/look/{quote(number)}", b""),
            lambda: (f"/examples/{quote(number)}", b""),
            lambda: ("/visits", b""),
        ]
        path, body = draw.choice(ways)()
        method = "DELETE" if path == "/visits" and draw.random() < 0.3 else "POST"
        if draw.random() < 0.05:
            method, path, body = (
                "GET",
                draw.choice(("/items/x", "/items/..%2f..%2fetc%2fpasswd", "/page.py", "/page.css/..", "/x")),
                b"",
            )
        return _oddly(draw, Odd("", method, path, body, {"Visit": visit, "Content-Type": kind}))

    def _post(self, path: str, body: bytes, visit: str) -> Said:
        return self._send(Odd("", "POST", path, body, {"Visit": visit}))

    def plain(self) -> bytes:
        """See `Door`."""
        visit = self._post("/visits", b"", "").body.decode()
        self._post("/items?name=a.png&together=true", pictures.drawings()["png"], visit)
        self._post("/items?name=b.wav&together=true", sounds.recordings()["wav"], visit)
        said = self._post("/ask", b"what", visit).body
        self._send(Odd("", "DELETE", "/visits", b"", {"Visit": visit}))
        last = json.loads(said.splitlines()[-1]).get("answer", said.decode())
        return json.dumps(re.findall(r"<button data-word[^>]*>(.*?)</button>", last) or last).encode()

    def sentence(self, said: Said) -> str | None:
        """See `Door`."""
        if said.body and said.kind.startswith("application/x-ndjson"):
            lines = [json.loads(line) for line in said.body.splitlines()]
            return re.sub(r"<[^>]*>|\n", "", lines[-1].get("notice", "")) or None
        return said.body.decode(errors="replace") or "No body."  # of HEAD
