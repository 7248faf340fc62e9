"""One `omni app` for all tests of the page, as a process of its own, watched for what it sends elsewhere."""

import http.client
import json
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

CHECKPOINT = "checkpoints/omni_tiny"


@dataclass
class Served:
    """The page.

    Attributes:
        files: the folder for temporary files that the process was given.
        sent: what it, or a browser that was told to, would have sent elsewhere.
    """

    address: str
    process: subprocess.Popen[str]
    files: Path
    sent: list[str] = field(default_factory=list)

    def send(self, path: str, body: bytes = b"", method: str = "POST", **headers: str) -> tuple[int, Any, str]:
        """One request: status, headers and body of what comes back."""
        status, found, content = self.fetch(path, body, method, **headers)
        return status, found, content.decode()

    def fetch(self, path: str, body: bytes = b"", method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        """The same of any file."""
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, content

    def enter(self) -> "Visitor":
        """Begin a visit."""
        return Visitor(self, self.send("/visits")[2])


@dataclass
class Visitor:
    """A visitor of the page without a browser."""

    served: Served
    token: str

    def send(self, path: str, body: bytes = b"", status: int = 200) -> list[dict[str, str]]:
        """The steps that the page shows, one after the other."""
        found, _, text = self.served.send(path, body, Visit=self.token)
        assert found == status, text
        return [json.loads(line) for line in text.splitlines()]

    def upload(self, path: str | Path, status: int = 200) -> dict[str, str]:
        name = quote(Path(path).name)
        return self.send(f"/items?name={name}&together=true", Path(path).read_bytes(), status)[-1]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, start_server: Callable[..., Any]) -> Iterator[Served]:
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        pytest.skip("the page needs a server: pip install -c constraints.txt -e '.[app]'")
    folder = tmp_path_factory.mktemp("app")
    (files := folder / "files").mkdir()
    outside = socket.create_server(("127.0.0.1", 0))  # the way to everything that is not this machine
    proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
    environment = {"TMPDIR": str(files), "NO_PROXY": "", "no_proxy": "", "HF_HUB_OFFLINE": "0"}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), proxy)
    sent: list[str] = []

    def listen() -> None:
        while True:
            try:
                connection, _ = outside.accept()
            except OSError:
                return
            sent.append(connection.recv(200).decode(errors="replace"))
            connection.close()

    threading.Thread(target=listen, daemon=True).start()
    process, port = start_server(folder / "log", "/", "app", CHECKPOINT, **environment)
    yield Served(f"http://127.0.0.1:{port}", process, files, sent)
    process.terminate()
    said = (folder / "log").read_text()
    assert process.wait(30) == 0, said
    assert "Traceback" not in said, said
    assert list(files.iterdir()) == []
    outside.close()


@pytest.fixture(scope="session")
def shipped() -> Any:
    """The model that the page has, and its processor."""
    from omni.loading.checkpoint import load

    return load(CHECKPOINT)


@pytest.fixture(scope="session")
def hearing(make_model: Callable[..., Any]) -> Any:
    """A model that takes pictures and sounds, and was trained with one question; its weights are random."""
    return _small(make_model, ["image", "audio"])


def _small(make_model: Callable[..., Any], names: list[str]) -> Any:
    pytest.importorskip("soundfile")
    from omni import OmniConfig, OmniFeatureExtractor, OmniImageProcessor, OmniProcessor
    from omni.training.tokenizer import train_tokenizer

    tokens = {name: f"<{name}>" for name in names}
    tokenizer = train_tokenizer(["what is that", "a red circle"] * 4, 300, tokens)
    block = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoders = {
        "image": {"model_type": "omni_vision", "image_size": 16, "patch_size": 8, **block},
        "audio": {"model_type": "omni_audio", "num_mel_bins": 20, "time_reduction": 8, **block},
    }
    sections = {
        name: {
            "encoder": encoder,
            "token_id": tokenizer.convert_tokens_to_ids(tokens[name]),
            "output": "cls+grid",
            "projector": "mlp",
        }
        for name, encoder in encoders.items()
        if name in names
    }
    text = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(config=OmniConfig(modalities=sections, text_config=text))
    preprocessors = {
        "image": OmniImageProcessor(size={"height": 16, "width": 16}),
        "audio": OmniFeatureExtractor(num_mel_bins=20),
    }
    preprocessors = {name: preprocessors[name] for name in names}
    processor = OmniProcessor(
        tokenizer=tokenizer, preprocessors=preprocessors, modalities=model.config.modalities, prompt="what is that"
    )
    return model, processor


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., Served]]:
    """`serve(model, processor, host)`: a page in this process."""
    uvicorn = pytest.importorskip("uvicorn")
    from starlette.middleware import Middleware

    from omni.app.door import Door, Reach
    from omni.app.page import make_app

    with ExitStack() as stack:

        def start(model: Any, processor: Any, host: str = "127.0.0.1") -> Served:
            opened = stack.enter_context(socket.create_server((host, 0)))
            reach = Reach.of(host, opened)
            app = make_app(model, processor, middleware=[Middleware(Door, reach=reach)])
            server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
            thread = threading.Thread(target=server.run, args=([opened],))
            thread.start()
            stack.callback(thread.join)
            stack.callback(setattr, server, "should_exit", True)
            return Served(f"http://127.0.0.1:{reach.port}", None, Path())  # type: ignore[arg-type]  # no process

        yield start


@pytest.fixture(scope="session")
def sounds(serve: Callable[..., Served], hearing: Any) -> Served:
    """The page of a model that hears."""
    return serve(*hearing)


@pytest.fixture(scope="session")
def pictures(serve: Callable[..., Served], make_model: Callable[..., Any]) -> Served:
    """The page of a model that sees, and nothing else."""
    return serve(*_small(make_model, ["image"]))


@pytest.fixture(scope="session")
def tone() -> bytes:
    """A WAV file of a second."""
    soundfile = pytest.importorskip("soundfile")
    file = BytesIO()
    soundfile.write(file, np.sin(np.arange(8000) / 5) * np.linspace(0, 1, 8000), 8000, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="session")
def expected(shipped: Any) -> Callable[..., Any]:
    """What `omni ask` answers about pictures, and where the Thinker looks for each word: `expected(question, *paths)`."""
    from omni.looking.attention import word_attention
    from omni.vision.pictures import read_picture

    return cache(lambda question, *paths: word_attention(*shipped, [*map(read_picture, paths)], question))


@pytest.fixture(scope="session")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """Files that are no pictures, each with the sentence of `read_picture` about it."""
    from omni.vision.pictures import PictureError, read_picture

    folder, large = tmp_path_factory.mktemp("damaged"), BytesIO()
    Image.new("1", (10_000, 10_000)).save(large, "PNG")
    contents = {
        "cut.jpg": Path("examples/scene.jpg").read_bytes()[:2000],
        "text.png": b"a picture of a red circle",
        "empty.png": b"",
        "large.png": large.getvalue(),
    }
    sentences = {}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        with pytest.raises(PictureError) as error:
            read_picture(folder / name)
        sentences[folder / name] = str(error.value).replace(str(folder / name), name)
    return sentences
