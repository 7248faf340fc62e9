"""Requests with pictures, sounds and items of a plug-in: what becomes of each part, and that OpenAI's own client is served.

The model has random weights, and three encoders: ours for pictures and sounds, and that of `plugins/omni_signal`.
"""

import asyncio
import base64
import copy
import dataclasses
import importlib.util
import io
import json
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pydantic
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from omni import (
    OmniConfig,
    OmniFeatureExtractor,
    OmniForConditionalGeneration,
    OmniImageProcessor,
    OmniProcessor,
    registry,
)
from omni.audio.sound import MAX_SAMPLES
from omni.audio.sounds import read_sound
from omni.modality import ItemError
from omni.registry import get_modality, register_modality
from omni.serving.fields import RequestError, parse
from omni.serving.requests import Chat, Response
from omni.serving.server import build
from omni.serving.worker import Worker
from omni.serving.writing import Piece
from omni.training.tokenizer import train_tokenizer

soundfile = pytest.importorskip("soundfile")
pytestmark = pytest.mark.new_chats
PLUGIN = Path(__file__).parents[1] / "plugins" / "omni_signal" / "omni_signal" / "plugin.py"
SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
ENCODERS: dict[str, Any] = {
    "audio": {"model_type": "omni_audio", "num_mel_bins": 20, **SMALL},
    "image": {"model_type": "omni_vision", "image_size": 16, "patch_size": 8, **SMALL},
    "signal": {"model_type": "toy_signal"},
}
TOKENS = {name: f"<{name}>" for name in ENCODERS}
NAME = "three"
LIMIT = 2048


def open_signal(source: Any) -> np.ndarray:
    """Floats, one after the other; the rate of that plug-in's files is of no concern here."""
    if not isinstance(source, bytes) or len(source) % 4:
        raise ItemError("The signal is no row of floats; send one.")
    return np.frombuffer(source, np.float32)


def png(seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def tone(seed: int = 0, seconds: float = 0.5, kind: str = "WAV", rate: int = 16_000) -> bytes:
    file, time = io.BytesIO(), np.arange(round(seconds * rate)) / rate
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * (300 + 150 * seed) * time), rate, format=kind)
    return file.getvalue()


def silence(samples: int) -> bytes:
    """A few kilobytes that become as many samples as they say."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(samples, np.int16), 16_000, format="FLAC")
    return file.getvalue()


def signal(seed: int = 0, length: int = 24) -> bytes:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32).tobytes()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{b64(data)}"


def spoken(data: bytes, kind: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": b64(data), "format": kind}}


def seen(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": uri("image/png", data)}}


def felt(data: bytes) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": uri("application/x-signal", data), "filename": "a.signal"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def chat(*parts: Any, **fields: Any) -> Chat:
    return Chat.model_validate({"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 8, **fields})


def ask(worker: Worker, request: Any) -> tuple[str, int]:
    """What is said, and how many tokens were read."""

    async def listen() -> tuple[str, int]:
        said = ""
        async for event in worker.take(request).answer():
            if isinstance(event, Piece):
                said += event.text
        return said, event.tokens_read

    return asyncio.run(listen())


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with registry.temporary():
        spec = importlib.util.spec_from_file_location("omni_signal.plugin", PLUGIN)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        door = {"open": open_signal, "media_types": ("application/x-signal",), "noun": "signal"}
        register_modality(dataclasses.replace(module.signal, **door))
        yield


@pytest.fixture(scope="module")
def make_worker(_registered: None) -> Iterator[Callable[..., Worker]]:
    """`make_worker("image", "audio", output="cls")`: a worker of these modalities."""
    workers: list[Worker] = []

    def make(*names: str, output: str = "cls+grid") -> Worker:
        tokenizer = train_tokenizer(["what is that", "which of them"] * 4, 300, {name: TOKENS[name] for name in names})
        given = {"output": output, "projector": "mlp"}
        sections = {
            name: {
                "encoder": copy.deepcopy(ENCODERS[name]),
                "token_id": tokenizer.convert_tokens_to_ids(TOKENS[name]),
                **given,
            }
            for name in names
        }
        thinker = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
        thinker |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        thinker |= {"max_position_embeddings": LIMIT}
        torch.manual_seed(0)
        model = OmniForConditionalGeneration(OmniConfig(modalities=sections, text_config=thinker)).eval()
        with torch.no_grad():  # large enough for every item to matter
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        preprocessors = {
            "image": OmniImageProcessor(size={"height": 16, "width": 16}),
            "audio": OmniFeatureExtractor(num_mel_bins=20),
        }
        processor = OmniProcessor(
            tokenizer=tokenizer,
            preprocessors={name: preprocessors[name] for name in names if name in preprocessors},
            modalities=model.config.modalities,
        )
        workers.append(Worker(model, processor))
        return workers[-1]

    yield make
    for each in workers:
        each.close()


@pytest.fixture(scope="module")
def worker(make_worker: Callable[..., Worker]) -> Worker:
    return make_worker("image", "audio", "signal")


def expected(worker: Worker, prompt: str, **items: Any) -> tuple[str, int]:
    inputs = worker.processor(text=f"<|user|>{prompt}<|assistant|>", return_tensors="pt", **items)
    length = inputs["input_ids"].shape[1]
    written = worker.model.generate(**inputs, max_new_tokens=8)[0, length:]
    return worker.processor.decode(written, skip_special_tokens=True), length


# --- What becomes of the parts ----------------------------------------------------------------------------------------


def test_items_of_every_modality_are_read_in_their_order(worker: Worker) -> None:
    sounds, pictures = [tone(0), tone(1, 0.2)], [png(0), png(1)]
    parts = [spoken(sounds[0]), seen(pictures[0]), text("what"), felt(signal()), spoken(sounds[1]), seen(pictures[1])]
    items = {"audio": [read_sound(each) for each in sounds], "signals": [open_signal(signal())]}
    items["images"] = [get_modality("image").open(each) for each in pictures]
    wanted = expected(worker, "<audio><image>what<signal><audio><image>", **items)
    assert ask(worker, chat(*parts)) == wanted
    items["audio"].reverse()
    other = expected(worker, "<audio><image>what<signal><audio><image>", **items)
    assert other != wanted, "another order is another prompt"
    parts[0], parts[4] = parts[4], parts[0]
    assert ask(worker, chat(*parts)) == other


class Held:
    """The signal of the test as an item of a class."""

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        return open_signal(signal())


@dataclasses.dataclass
class Record(Held):
    rate: int = 8000


class Table(Held, UserDict):  # type: ignore[type-arg]
    pass


class Document(Held, pydantic.BaseModel):
    rate: int = 8000


@pytest.mark.parametrize("item", [Record(), Table(rate=8000), Document()])
def test_an_item_of_any_class_stays_what_it_is_in_a_chat(worker: Worker, item: Any) -> None:
    """transformers 5.24 makes dictionaries of dataclasses, mappings and pydantic models in chats."""
    made = [
        worker.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "signal", "signal": each}, text("what")]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for each in (open_signal(signal()), item)
    ]
    assert made[0].keys() == made[1].keys() >= {"signal_values", "input_ids"}
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


SOUND = tone()
FORMS: dict[str, dict[str, Any]] = {
    "recording": spoken(SOUND),
    "recording of another kind": spoken(SOUND, "mp3"),  # what a file holds decides
    "address": {"type": "audio_url", "audio_url": {"url": uri("audio/x-wav", SOUND)}},
    "address in short": {"type": "audio_url", "audio_url": uri("AUDIO/WAV", SOUND)},
    "address that says nothing": {"type": "audio_url", "audio_url": {"url": uri("", SOUND)}},
    "address of what says nothing": {"type": "audio_url", "audio_url": {"url": uri("application/octet-stream", SOUND)}},
    "file": {"type": "file", "file": {"file_data": uri("audio/wav", SOUND), "filename": "a.wav"}},
    "input file": {"type": "input_file", "file_data": uri("audio/wav", SOUND), "filename": "a.wav"},
    "what its data says": {"type": "image_url", "image_url": {"url": uri("audio/wav", SOUND)}},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_part_belongs_to_the_modality_of_its_media_type(worker: Worker, form: str) -> None:
    wanted = expected(worker, "<audio>what", audio=read_sound(SOUND))
    assert ask(worker, chat(FORMS[form], text("what"))) == wanted
    response = {"input": [{"role": "user", "content": [FORMS[form], {"type": "input_text", "text": "what"}]}]}
    assert ask(worker, Response.model_validate({**response, "max_output_tokens": 8})) == wanted


@pytest.mark.parametrize(("kind", "rate"), [("FLAC", 22_050), ("OGG", 16_000), ("MP3", 44_100)])
def test_sounds_of_every_kind_and_rate(worker: Worker, kind: str, rate: int) -> None:
    data = tone(kind=kind, rate=rate)
    assert ask(worker, chat(spoken(data, kind.lower()))) == expected(worker, "<audio>", audio=read_sound(data))


def test_a_model_is_tried_with_every_modality_before_anybody_asks(worker: Worker) -> None:
    worker.try_out()
    for name in ENCODERS:
        tower = getattr(worker.model.model, f"{name}_tower")

        def fail(*args: Any, name: str = name) -> None:
            raise RuntimeError(f"no {name} here")

        hook = tower.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match=f"no {name} here"):
            worker.try_out()
        hook.remove()


# --- What is refused --------------------------------------------------------------------------------------------------


def test_what_a_model_has_no_encoder_for_is_refused_by_its_noun(make_worker: Callable[..., Worker]) -> None:
    only = {name: make_worker(name) for name in ("image", "audio")}
    for name, part, noun in (("image", spoken(SOUND), "sounds"), ("audio", seen(png()), "pictures")):
        with pytest.raises(
            RequestError, match=rf"takes no {noun}, found one in messages\[0\].content\[1\]; leave it out"
        ):
            ask(only[name], chat(text("what"), part))
    with pytest.raises(RequestError, match="takes no signals, found one in"):
        ask(only["image"], chat(felt(signal())))


def test_what_belongs_to_no_modality_is_refused(worker: Worker) -> None:
    film = {"type": "video_url", "video_url": {"url": uri("video/mp4", b"film")}}
    takes = "This model takes sounds and pictures and signals, and the file in"
    with pytest.raises(RequestError, match=rf"{takes} messages\[0\].content\[0\] says that it is 'video/mp4'"):
        ask(worker, chat(film))
    with pytest.raises(RequestError, match=f"{takes} .* says that it is 'application/pdf'"):
        ask(worker, chat({"type": "file", "file": {"file_data": uri("application/pdf", b"%PDF"), "filename": "a.pdf"}}))
    with pytest.raises(RequestError, match="does not say what it is; send a data URI with a media type"):
        ask(worker, chat({"type": "file", "file": {"file_url": "https://example.org/a.wav"}}))


def test_a_file_that_cannot_be_read_is_told_by_its_noun(worker: Worker) -> None:
    damaged: list[tuple[dict[str, Any], str]] = [
        (spoken(SOUND[:-100]), "The sound in messages.0..content.1. cannot be used: .* promises"),
        (spoken(png()), "The sound in messages.0..content.1. cannot be used: .* found a picture"),
        (seen(SOUND), "The picture in messages.0..content.1. cannot be used: .* not a picture"),
        (felt(b"abc"), "The signal in messages.0..content.1. cannot be used: The signal is no row of floats"),
        ({"type": "input_audio", "input_audio": {"data": "$$", "format": "wav"}}, "its data is not valid base64"),
    ]
    for part, sentence in damaged:
        with pytest.raises(RequestError, match=sentence):
            ask(worker, chat(seen(png()), part))


@pytest.mark.parametrize("address", ["/etc/passwd", "file:" + "///etc/passwd", "a.wav"])
def test_files_on_the_server_are_not_read(worker: Worker, address: str) -> None:
    for kind in ("audio_url", "image_url"):
        with pytest.raises(RequestError, match="expected a data URI .*; files on the server are not read"):
            ask(worker, chat({"type": kind, kind: {"url": address}}))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "input_audio"}, "a part of type 'input_audio' has 'input_audio' and nothing else"),
    ({**spoken(b"a"), "text": "x"}, "has 'input_audio' and nothing else"),
    ({**spoken(b"a"), "audio_url": {"url": "x"}}, "has 'input_audio' and nothing else"),
    ({"type": "input_audio", "input_audio": {"data": "a"}}, "Expected 'messages.0..content.0..input_audio.format'"),
    ({"type": "input_audio", "input_audio": {"data": "a", "format": "x" * 21}}, "at most 20 characters"),
    ({"type": "input_audio", "input_audio": {"data": "a", "format": "a,b"}}, "format"),
    ({"type": "file", "file": {"file_id": "file-1"}}, "does not know 'messages.0..content.0..file.file_id'"),
    ({"type": "file", "file": {"filename": "a.wav"}}, "a file has 'file_data' or 'file_url'"),
    ({"type": "input_file", "file_id": "file-1"}, "'file_data' or 'file_url'; none is kept under an id"),
    ({"type": "audio", "path": "/etc/passwd"}, "found 'audio'"),
]


@pytest.mark.parametrize(("part", "sentence"), WRONG, ids=[sentence[:50] for _, sentence in WRONG])
def test_a_part_that_is_not_as_expected_is_refused(part: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        parse(Chat, json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode())


def test_items_belong_to_users() -> None:
    for part, noun in ((spoken(SOUND), "sounds"), (seen(png()), "pictures"), (felt(signal()), "signals")):
        with pytest.raises(RequestError, match=f"{noun} belong to the role 'user'"):
            parse(Chat, json.dumps({"messages": [{"role": "system", "content": [part]}]}).encode())


# --- What is bounded --------------------------------------------------------------------------------------------------


@pytest.fixture
def deaf(worker: Worker) -> Iterator[None]:
    """An encoder of sounds that must not be reached."""

    def fail(*args: Any) -> None:
        raise AssertionError("the sound was encoded")

    hook = worker.model.model.audio_tower.register_forward_pre_hook(fail)
    yield
    hook.remove()


@pytest.mark.usefixtures("deaf")
def test_tokens_of_sounds_are_counted_before_they_are_encoded(worker: Worker) -> None:
    long = silence(16_000 * 170)  # a token for every 80 ms, and CLS
    with pytest.raises(RequestError, match="items are 2,127 tokens, which leaves no room for an answer in the 2,048"):
        ask(worker, chat(spoken(long)))
    many = [*[spoken(b"no sound")] * 980, *[seen(b"no picture")] * 18]  # of two tokens at least, and of five
    with pytest.raises(RequestError, match="items are 2,050 tokens"):
        ask(worker, chat(*many))


@pytest.mark.usefixtures("deaf")
def test_samples_of_sounds_are_counted_before_one_is_opened(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omni.serving.worker.MAX_UNITS", 40_000)
    parts = [spoken(tone(kind=kind)) for kind in ("WAV", "FLAC", "OGG", "MP3", "WAV", "WAV")]

    def fail(source: Any) -> None:
        raise AssertionError("the sound was opened")

    monkeypatch.setitem(vars(get_modality("audio")), "open", fail)
    with pytest.raises(RequestError, match="The sounds have 48,000 samples together, expected at most 40,000"):
        ask(worker, chat(*parts))


def test_a_file_counts_as_many_samples_as_it_is_read_to() -> None:
    measure = get_modality("audio").measure
    assert measure is not None
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        data = tone(kind=kind)
        assert len(read_sound(data).samples) <= measure(data) <= len(read_sound(data).samples) + 2400
        tagged = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10) + data
        assert measure(tagged) == measure(data), kind
    stereo = io.BytesIO()
    soundfile.write(stereo, np.zeros((100, 2)), 16_000, format="WAV")
    assert measure(stereo.getvalue()) == 200
    unknown = bytearray(tone(kind="FLAC"))
    unknown[21:26] = bytes([unknown[21] & 0xF0, 0, 0, 0, 0])  # a stream that does not know its length
    assert measure(bytes(unknown)) == MAX_SAMPLES
    assert measure(b"no sound") == 0


# --- OpenAI's client --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(worker: Worker) -> openai.OpenAI:
    app = build(worker, [NAME], {"testserver"}, lambda address: False)
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=TestClient(app))


def test_openais_client_gets_vectors_of_items(worker: Worker, client: openai.OpenAI) -> None:
    """Those of the encoders alone, by transformers; the client asks for base64 where it is not told otherwise."""
    pictures, model = [png(3), png(4)], worker.model.model
    prepared = worker.processor.preprocessors["image"](
        [get_modality("image").open(each) for each in pictures], return_tensors="pt"
    )
    heard = worker.processor.preprocessors["audio"](read_sound(SOUND), return_tensors="pt")
    with torch.no_grad():
        wanted = [*model.image_tower(**prepared).cls[:, 0], model.audio_tower(**heard).cls[0, 0]]
    parts: Any = [seen(pictures[0]), seen(pictures[1]), spoken(SOUND)]
    for options in ({}, {"encoding_format": "float"}):
        found = client.embeddings.create(model=NAME, input=parts, **options)  # type: ignore[call-overload]
        assert [each.index for each in found.data] == [0, 1, 2]
        for each, vector in zip(found.data, wanted, strict=True):
            assert each.embedding == pytest.approx(vector.tolist(), abs=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("what", r"makes vectors of .*pictures.*, found text in input\[0\]; send items as parts"),
        ([seen(b"no picture")], r"The picture in input\[0\] cannot be used"),
        ([[1, 2]], "it should be an object"),
        ([], "at least 1"),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}], "private"),
    ],
    ids=["text", "damaged", "tokens", "nothing", "address"],
)
def test_what_has_no_vector_is_refused(given: Any, words: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.embeddings.create(model=NAME, input=given)


def test_openais_client_sends_sounds(worker: Worker, client: openai.OpenAI) -> None:
    wanted, length = expected(
        worker, "<audio>what<image>", audio=read_sound(SOUND), images=get_modality("image").open(png())
    )
    content: Any = [spoken(SOUND), text("what"), seen(png())]
    messages: Any = [{"role": "user", "content": content}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8)
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (wanted, length)
    stream = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == wanted
    content = [spoken(SOUND), {"type": "input_text", "text": "what"}]
    content += [{"type": "input_image", "image_url": uri("image/png", png())}]
    turn: Any = [{"role": "user", "content": content}]
    assert client.responses.create(model=NAME, input=turn, max_output_tokens=8).output_text == wanted
    with client.responses.stream(model=NAME, input=turn, max_output_tokens=8) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_addresses_of_sounds_are_bounded_as_those_of_pictures(client: openai.OpenAI, stream: bool) -> None:
    part: Any = {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:1/a.wav"}}
    messages: Any = [{"role": "user", "content": [text("what"), part]}]
    with pytest.raises(
        openai.BadRequestError, match=r"The sound in messages\[0\]\.content\[1\] cannot be used: .*private"
    ):
        client.chat.completions.create(model=NAME, messages=messages, stream=stream)
