"""From where files are read. Strangers may have written rows and chats, so private networks are left out."""

import io
import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from omni import OmniConfig, OmniFeatureExtractor, OmniImageProcessor, OmniProcessor
from omni.data.manifests import Manifest
from omni.data.sources import ManifestError
from omni.downloads import content_of, download
from omni.files import ReadError
from omni.items import read_item
from omni.modality import ItemError
from omni.training.tokenizer import train_tokenizer
from tests.audio.conftest import chirp, file_of
from tests.conftest import web_servers

SCENE = Path("examples/scene.png")


class Site(BaseHTTPRequestHandler):
    """/picture, /sound, and /to?URL redirects there; it counts its visitors."""

    visits = 0

    def do_GET(self) -> None:
        type(self).visits += 1
        path, _, target = self.path.partition("?")
        if path.endswith("/to"):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SCENE.read_bytes() if path.endswith("picture") else file_of(chirp(rate=8_000), 8_000))

    def log_message(self, *args: Any) -> None:
        pass


class Secret(Site):
    """What only this machine can reach."""

    visits = 0


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of a server at 127.0.0.1, and of a secret one at 127.0.0.2."""
    with web_servers(Site, Secret) as found:
        yield found


@pytest.fixture(autouse=True)
def nobody_learns_the_secret() -> Iterator[None]:
    yield
    assert Secret.visits == 0


@pytest.fixture
def first_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 127.0.0.1 were on the internet."""
    monkeypatch.setattr("omni.downloads.is_public", "127.0.0.1".__eq__)


def read(address: str, **settings: Any) -> bytes:
    download(address, found := io.BytesIO(), 10_000_000, 20, **settings)
    return found.getvalue()


HOSTS = [
    "127.0.0.1",
    "127.0.0.2",
    "localhost",
    "2130706434",
    "0x7f.1",
    "0",
    "[::ffff:127.0.0.2]",
    "[::1]",
    "me@127.0.0.2",
]


@pytest.mark.parametrize("host", HOSTS)
def test_no_spelling_of_this_machine_is_reached(port: int, host: str) -> None:
    before = Site.visits
    with pytest.raises(
        ReadError, match="is this machine or in a private network, where nothing is read from; download"
    ):
        read(f"http://{host}:{port}/picture")
    with pytest.raises(ReadError, match="is this machine or in a private network"):
        read(f"https://{host}:{port}/picture")
    assert Site.visits == before


@pytest.mark.usefixtures("first_is_public")
def test_redirects_are_held_to_the_same_rule(port: int) -> None:
    site = f"http://127.0.0.1:{port}"
    assert read(f"{site}/picture") == read(f"{site}/to?/picture") == SCENE.read_bytes()
    for target in (f"http://127.0.0.2:{port}/picture", f"//127.0.0.2:{port}/picture", "http://169.254.169.254/latest"):
        with pytest.raises(ReadError, match="private network"):
            read(f"{site}/to?{target}")
    for target in (f"ftp://127.0.0.2:{port}/picture", SCENE.absolute().as_uri(), "data:,x"):
        with pytest.raises(ReadError, match="cannot be fetched"):
            read(f"{site}/to?{target}")


@pytest.mark.usefixtures("first_is_public")
def test_a_name_is_looked_up_once_and_all_its_addresses_count(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, true = [], socket.getaddrinfo

    def look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(host).endswith(".example"):
            return true(host, *args, **kwargs)
        asked.append(host)
        both = ["127.0.0.1", "127.0.0.2"]
        addresses = both if host == "both.example" else both[len(asked) - 1 :][:1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, args[0])) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert read(f"http://turns.example:{port}/picture") == SCENE.read_bytes()
    assert asked == ["turns.example"]
    with pytest.raises(ReadError, match="'both.example' is this machine or in a private network"):
        read(f"http://both.example:{port}/picture")


def test_a_proxy_of_the_user_is_used(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    assert read("http://nowhere.invalid/picture") == SCENE.read_bytes()
    assert read("http://1.1.1.1/picture") == SCENE.read_bytes()
    with pytest.raises(ReadError, match="private network"):
        read("http://169.254.169.254/picture")
    with pytest.raises(ReadError, match="private network"):
        read(f"http://nowhere.invalid/to?http://127.0.0.2:{port}/picture")


def test_what_fsspec_reaches_in_ways_of_its_own_is_refused() -> None:
    pytest.importorskip("fsspec")
    ways = ["ftp://127.0.0.1/a", "zip://a.png::http://127.0.0.1/a.zip", "memory://a::http://127.0.0.1/a", "dask://a/b"]
    for address in ways:
        with pytest.raises(ReadError, match="may be in a private network, as fsspec does not check that"):
            read(address)


def test_rows_name_private_addresses_only_where_the_user_allows_it(port: int, tmp_path: Path) -> None:
    row = {"image": f"http://127.0.0.1:{port}/picture", "caption": "x"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    refused = Manifest.read(tmp_path / "rows.jsonl", addresses=tmp_path / "kept")
    with pytest.raises(ItemError, match=r"rows.jsonl, line 1: '127.0.0.1' is this machine .*`allow_private` beside"):
        refused[0].open()
    assert not [*(tmp_path / "kept").iterdir()]
    with pytest.raises(ManifestError, match="private network"):
        Manifest.read(f"http://127.0.0.1:{port}/rows.jsonl", addresses=tmp_path / "kept")
    with pytest.raises(ManifestError, match="may be in a private network"):
        Manifest.read(f"http://127.0.0.1:{port}/*.parquet", addresses=tmp_path / "kept")
    allowed = Manifest.read(tmp_path / "rows.jsonl", addresses=tmp_path / "kept", allow_private=True)
    assert allowed[0].open()["image"][0].size == read_item(SCENE).value.size


@pytest.fixture(scope="module")
def sections() -> dict[str, Any]:
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoders = {
        "image": {"model_type": "omni_vision", "image_size": 224, "patch_size": 56, **size},
        "audio": {"model_type": "omni_audio", "num_mel_bins": 20, **size},
    }
    thinker = {"model_type": "qwen3", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48}
    sections = {
        name: {"encoder": encoder, "projector": "mlp", "token_id": 300 + number}
        for number, (name, encoder) in enumerate(encoders.items())
    }
    return OmniConfig(modalities=sections, text_config=thinker).modalities


@pytest.mark.usefixtures("first_is_public")
@pytest.mark.parametrize("foreign", [False, True], ids=["omni", "transformers"])
def test_items_of_a_processor_come_from_public_addresses(port: int, foreign: bool, sections: dict[str, Any]) -> None:
    """Also where a preprocessor of transformers is used, which would fetch them itself."""
    from transformers import ASTFeatureExtractor, CLIPImageProcessorPil

    tokenizer = train_tokenizer(["what is that"] * 4, 300, {"image": "<image>", "audio": "<audio>"})
    processor = OmniProcessor(
        CLIPImageProcessorPil() if foreign else OmniImageProcessor(),
        tokenizer,
        feature_extractor=ASTFeatureExtractor() if foreign else OmniFeatureExtractor(num_mel_bins=20),
        modalities=sections,
    )
    given = {"<image>": ("images", "picture"), "<audio>": ("audio", "sound")}
    for token, (argument, path) in given.items():
        if foreign and argument == "audio":
            continue
        found = processor(text=token, **{argument: f"http://127.0.0.1:{port}/{path}"})
        assert set(found) & {"pixel_values", "audio_features"}
        with pytest.raises(ItemError, match="'127.0.0.2' is this machine or in a private network"):
            processor(text=token, **{argument: f"http://127.0.0.2:{port}/{path}"})
        with pytest.raises(ItemError, match="private network"):
            processor(text=token, **{argument: f"HTTP://127.0.0.2:{port}/{path}"})


def test_a_data_uri_is_a_file_like_any_other() -> None:
    assert content_of("data:;base64,aGFs\nbG8=", 10) == b"hallo"
    assert content_of("hallo", 10) is None
    with pytest.raises(ReadError, match="is no base64"):
        content_of("data:;base64,a$", 10)
