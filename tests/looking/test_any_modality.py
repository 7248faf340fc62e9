"""`omni ask`, `attend` and `inspect` with sounds, and with signals, of which no line of omni knows."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import WhisperConfig, WhisperFeatureExtractor

from omni import OmniConfig, OmniForConditionalGeneration, OmniImageProcessor, OmniProcessor, registry
from omni.audio.configuration_audio import OmniAudioConfig
from omni.audio.feature_extraction_audio import OmniFeatureExtractor
from omni.audio.modeling_audio import OmniAudioModel
from omni.audio.sound import Sound
from omni.data.conversations import ask
from omni.fusion.thinker import eager_attention
from omni.items import read_items
from omni.loading.encoder import Encoder, load_encoder
from omni.looking.attention import encoder_attention, session_attention, word_attention
from omni.looking.layers import inspect_encoder
from omni.looking.panels import draw_encoder, draw_words, overlay
from omni.questions import QuestionError, write_prompts
from omni.session import Session, answer
from omni.training.tokenizer import train_tokenizer

from ..conftest import invoke, refuse, succeed

ROOT = Path(__file__).parents[2]
PLUGIN = '''
"""Signals that have files, and may be shown."""
import dataclasses, os
from pathlib import Path
import numpy as np
from omni.modality import ItemError
from omni_signal.plugin import signal as bare

def read_signal(source):
    if not isinstance(source, str | os.PathLike | bytes):
        raise TypeError("Expected a path or bytes.")
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ItemError(f"{source} cannot be read.") from error
    if not content.startswith(b"SIG:"):
        raise ItemError("This is not a signal.")
    return np.frombuffer(content[4:], np.float32)

signal = dataclasses.replace(bare, open=read_signal, suffixes=(".sig",), noun="signal", show=None, probes=None)
'''
AUDIO = {
    "num_mel_bins": 20,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGE = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODALITIES: dict[str, Any] = {
    "audio": {"encoder": {"model_type": "omni_audio", **AUDIO}, "projector": "unshuffle_mlp", "factor": 2},
    "image": {"encoder": {"model_type": "omni_vision", **IMAGE, "intermediate_size": 32}, "output": "grid"},
    "signal": {"encoder": {"model_type": "toy_signal"}},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders to import from, as pip leaves them when it has installed a plug-in."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "signal_files.py").write_text(PLUGIN)
    about = folder / "signal_files-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: signal-files\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[omni.modalities]\nsignal = signal_files:signal\n")
    return [str(folder), str(ROOT / "tests" / "plugins" / "omni_signal")]


@pytest.fixture(scope="module", autouse=True)
def _installed(site: list[str]) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    for folder in site:
        patch.syspath_prepend(folder)
    importlib.invalidate_caches()
    with registry.temporary():
        yield
    patch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] in ("omni_signal", "signal_files")]:
        del sys.modules[name]


def tone(seconds: float = 0.35, rate: int = 16_000) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.4 * np.sin(2000 * (1 + time) * time)).astype(np.float32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A sound, a picture and a signal."""
    import soundfile

    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    soundfile.write(folder / "a.wav", tone(), 16_000)
    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / "b.png")
    (folder / "c.sig").write_bytes(b"SIG:" + random.normal(size=12).astype(np.float32).tobytes())
    return [str(folder / name) for name in ("a.wav", "b.png", "c.sig")]


@pytest.fixture(scope="module")
def pair(_installed: None) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    tokens = {name: f"<{name}>" for name in MODALITIES}
    tokenizer = train_tokenizer(["what is that", "a red circle"] * 4, 300, tokens)
    sections = {
        name: {"projector": "mlp", **section, "token_id": tokenizer.convert_tokens_to_ids(tokens[name])}
        for name, section in MODALITIES.items()
    }
    text = {"model_type": "qwen3", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = OmniForConditionalGeneration(OmniConfig(modalities=sections, text_config=text)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    preprocessors = {"audio": OmniFeatureExtractor(num_mel_bins=20)}
    preprocessors["image"] = OmniImageProcessor(size={"height": 16, "width": 16})
    return model, OmniProcessor(tokenizer=tokenizer, preprocessors=preprocessors, modalities=model.config.modalities)


@pytest.fixture(scope="module")
def folder(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saved = tmp_path_factory.mktemp("model")
    for each in pair:
        each.save_pretrained(saved)
    return saved


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audio encoder alone."""
    saved = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model = OmniAudioModel(OmniAudioConfig(**AUDIO))
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for attention to be uneven
            parameter.normal_(std=0.5)
    model.save_pretrained(saved)
    OmniFeatureExtractor(num_mel_bins=20).save_pretrained(saved)
    return saved


# --- ask --------------------------------------------------------------------------------------------------------------


@pytest.mark.new_chats
def test_ask_takes_files_of_any_modality(pair: Any, folder: Path, files: list[str]) -> None:
    made = ("--checkpoint", folder, "--max-new-tokens", 4, "--json")
    said = json.loads(succeed("ask", *files, "what is that", *made))
    expected = answer(*pair, files, "what is that", 4)
    assert (said["answer"], said["tokens_read"]) == (expected.answer, expected.tokens_read)
    assert json.loads(succeed("ask", files[2], "what is that", *made))["tokens_read"] < expected.tokens_read


def test_a_file_that_the_model_has_no_encoder_for_is_refused_at_once(files: list[str], tmp_path: Path) -> None:
    assert "This model takes sounds and pictures, found a signal; leave it out" in refuse(
        "ask", files[1], files[2], "what"
    )
    code = (
        "import sys, omni.cli.app\n"
        "try: omni.cli.app.app(sys.argv[1:])\n"
        "except SystemExit: print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    config = json.loads(Path("checkpoints/omni_tiny/config.json").read_text())
    del config["modalities"]["audio"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = [sys.executable, "-c", code, "ask", files[1], files[0], "what", "--checkpoint", str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
    assert done.stderr == "Error: This model takes pictures, found a sound; leave it out.\n"


@pytest.mark.new_chats
def test_a_file_may_ask_where_the_model_was_trained_so(pair: Any, files: list[str], tmp_path: Path) -> None:
    model, processor = pair
    sound, picture, signal = files
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    made = ("--checkpoint", tmp_path)
    assert f"found the file '{sound}'; add the question" in refuse("ask", picture, sound, *made)
    with pytest.raises(QuestionError, match="The question is empty"):
        answer(model, processor, [picture, sound], "")

    spoken = OmniProcessor.from_pretrained(tmp_path, asked_by=["audio"])
    spoken.save_pretrained(tmp_path)
    spoken = OmniProcessor.from_pretrained(tmp_path)
    assert spoken.asked_by == ["audio"]
    said = json.loads(succeed("ask", picture, sound, *made, "--max-new-tokens", 4, "--json"))
    assert said["question"] == ""
    assert said["answer"] == answer(model, spoken, [picture, sound], "", 4).answer
    assert json.loads(succeed("ask", picture, "what", *made, "--json"))["question"] == "what"
    assert f"or a sound that asks, found the file '{signal}'; add one of them" in refuse("ask", picture, signal, *made)
    with pytest.raises(QuestionError, match="The question is empty"):
        answer(model, spoken, [picture], " ")
    maps = json.loads(succeed("attend", picture, sound, *made, "--max-new-tokens", 4, "--json"))
    assert (maps["question"], maps["answer"]) == ("", said["answer"])

    with pytest.raises(ValueError, match=r"Asked by items of \['depth'\]"):
        OmniProcessor.from_pretrained(tmp_path, asked_by=["depth"])
    assert OmniProcessor.from_pretrained(tmp_path, modalities={"audio": None}).asked_by == []


# --- attend -----------------------------------------------------------------------------------------------------------


@pytest.mark.new_chats
def test_the_thinker_looks_at_items_of_every_modality(pair: Any, files: list[str]) -> None:
    model, processor = pair
    found = word_attention(model, processor, files, "what is that", 5)
    assert found.words
    tokens = -(-(1 + len(tone()) // 160) // 8)
    assert tokens % 2  # so the last token of the projector has folded one place alone
    assert [maps.shape for maps in found.maps] == [(len(found.words), *grid) for grid in ((tokens,), (2, 2), (3,))]
    everything = sum(maps.reshape(len(maps), -1).sum(1) for maps in found.maps) + found.cls.sum(0) + found.text
    np.testing.assert_allclose(everything, 1, atol=1e-5)

    inputs = write_prompts(processor, [ask("what is that", items=read_items(files))])
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True).attentions
    row, ids = torch.stack(layers).mean((0, 2))[0, -1].numpy(), inputs["input_ids"][0].numpy()
    weights = {name: row[ids == model.config.modalities[name]["token_id"]] for name in MODALITIES}
    one = word_attention(model, processor, files, "what is that", 1)  # a word of one token
    assert len(one.words) == 1
    np.testing.assert_allclose(one.cls[:, 0], [weights["audio"][0], 0, weights["signal"][0]], atol=1e-6)
    folded = weights["audio"][1:]
    np.testing.assert_allclose(one.maps[0][0], [*np.repeat(folded[:-1] / 2, 2), folded[-1]], atol=1e-6)
    np.testing.assert_allclose(one.maps[1][0].flatten(), weights["image"], atol=1e-6)
    np.testing.assert_allclose(one.maps[2][0], weights["signal"][1:], atol=1e-6)

    session = Session(model, processor, [files[2], files[0], files[2]])
    again = session_attention(session, "what is that", 5)
    assert [maps.shape[1:] for maps in again.maps] == [(3,), (tokens,), (3,)]


def test_the_audio_encoder_shows_where_it_looks(encoder_folder: Path, files: list[str]) -> None:
    encoder = load_encoder(encoder_folder)
    sound = read_items(files)[0].value
    found = encoder_attention(encoder, sound, 1)
    inputs = OmniFeatureExtractor(num_mel_bins=20)([sound], return_tensors="pt")
    with torch.no_grad():
        maps = encoder.model(inputs["input_features"], output_attentions=True).attentions[0][0]
    assert (found.layer, found.layers, found.query) == (1, 2, "CLS")
    assert found.heads.std() > 0.01
    np.testing.assert_allclose(found.heads, maps[:, 0, 1:], atol=1e-6)
    np.testing.assert_allclose(found.rollout, (maps.mean(0)[0, 1:]) / 2, atol=1e-6)
    printed = json.loads(succeed("attend", files[0], "--checkpoint", encoder_folder, "--layer", 1, "--json"))
    assert list(printed) == ["sounds", "checkpoint", "layer", "layers", "query", "heads", "rollout", "mean"]
    np.testing.assert_allclose(printed["heads"], found.heads, atol=1e-6)


def test_an_encoder_that_pads_shows_the_sound_alone() -> None:
    config = WhisperConfig(d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=20,
                           max_source_positions=50)  # fmt: skip
    bundle = registry.get_modality("audio")
    torch.manual_seed(0)
    tower = bundle.build_tower(config).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(std=0.5)
    encoder = Encoder(tower, WhisperFeatureExtractor(feature_size=20, chunk_length=1), modality="audio")
    found = encoder_attention(encoder, Sound(tone(), 16_000))
    inputs = encoder.prepare([Sound(tone(), 16_000)])
    with torch.no_grad(), eager_attention(tower.config):
        maps = tower(inputs["audio_features"], output_attentions=True).attentions[0][0]
    assert maps.shape == (2, 50, 50)
    assert (found.query, found.heads.shape) == ("all tokens", (2, 18))
    np.testing.assert_allclose(found.heads, maps[:, :18, :18].mean(1), atol=1e-6)


def test_a_map_over_time_is_a_band_under_the_picture() -> None:
    picture = Image.new("RGB", (60, 80), (250, 250, 250))
    drawn = np.asarray(overlay(picture, np.array([0, 0.1, 0.3], dtype=np.float32)), dtype=int)
    assert drawn.shape == (80, 60, 3)
    assert (drawn[:70] == 250).all()
    band = drawn[70:].reshape(10, 3, 20, 3)
    assert (band == band[:1, :, :1]).all()  # one colour for each stretch of time
    dark, middle, bright = band[0, :, 0].sum(-1)
    assert dark < 10 < middle < bright


@pytest.mark.new_chats
def test_maps_are_drawn_over_what_is_seen_of_an_item(pair: Any, folder: Path, files: list[str], tmp_path: Path) -> None:
    made = ("--checkpoint", folder, "--max-new-tokens", 4)
    done = invoke("attend", *files, "what", "-o", tmp_path / "all.png", *made)
    assert done.exit_code == 0
    told = "A signal cannot be drawn, as its plug-in does not show it; --json prints the numbers."
    assert done.stderr.splitlines() == [f"Wrote {tmp_path / 'all.png'}", told]
    found = word_attention(*pair, files, "what", 4)
    with Image.open(tmp_path / "all.png") as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(draw_words(found, pair[1], files)))
    assert told.split(";")[0] in refuse("attend", files[2], "what", "-o", tmp_path / "none.png", *made)
    printed = json.loads(succeed("attend", *files, "what", "--json", *made))
    assert {name: printed[name] for name in ("sounds", "pictures", "signals")} == {
        "sounds": files[:1], "pictures": files[1:2], "signals": files[2:]}  # fmt: skip
    for maps, expected in zip(printed["maps"], found.maps, strict=True):
        np.testing.assert_allclose(maps, expected, atol=1e-6)


def test_the_heads_of_the_audio_encoder_are_drawn(encoder_folder: Path, files: list[str], tmp_path: Path) -> None:
    succeed("attend", files[0], "--checkpoint", encoder_folder, "-o", tmp_path / "heads.png")
    encoder, item = load_encoder(encoder_folder), read_items(files)[0].value
    with Image.open(tmp_path / "heads.png") as sheet:
        expected = draw_encoder(encoder_attention(encoder, item), encoder, item)
        assert np.array_equal(np.asarray(sheet), np.asarray(expected))
        assert sheet.width == 16 + 5 * (224 + 16)


def test_where_nothing_can_be_shown_a_sentence_says_so(folder: Path, files: list[str]) -> None:
    assert "SignalEncoder gives no maps of attention" in refuse("attend", files[2], "--checkpoint", folder, "--json")
    assert "No encoder of signals is shipped; name a folder" in refuse("attend", files[2], "--json")


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["conv1d", "conv2d"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_the_steps_of_the_audio_encoder(stem: str, cls_token: bool, tmp_path: Path) -> None:
    config = OmniAudioConfig(**{**AUDIO, "num_mel_bins": 80}, stem=stem, stem_channels=8, cls_token=cls_token)
    found = inspect_encoder(config, batch_size=2, item=Sound(np.zeros(16_000, np.float32), 16_000))
    assert found.inputs == {"input_features": (2, 101, 80), "attention_mask": (2, 101)}
    rows = {row.name: row for row in found.rows if not row.depth}
    d, n = 24, 13  # 101 frames, 8 of which become a token
    added = [] if not cls_token else ["CLS in front"]
    assert list(rows) == ["stem", "plus positions", *added, "block 1", "block 2", "RMSNorm", "cls", "grid"]
    convolutions = [row for row in found.rows if row.name.startswith("convolution ")]
    if stem == "conv1d":
        sizes = [(80, 101), (d, 51), (d, 26), (d, n)]
        expected = [((2, d, frames), 3 * wide * d + d, 2 * 2 * 3 * wide * d * frames) for wide, frames in sizes]
    else:
        sizes = [(1, 51, 40), (8, 26, 20), (8, n, 10)]
        expected = [((2, 8, high, across), 9 * wide * 8 + 8, 2 * 2 * 9 * wide * 8 * high * across)
                    for wide, high, across in sizes]  # fmt: skip
        projection = next(row for row in found.rows if row.name == "projection")
        assert (projection.shape, projection.parameters) == ((2, n, d), 80 * d + d)
    assert [(row.shape, row.parameters, row.flops) for row in convolutions] == expected
    assert rows["stem"].flops == sum(row.flops for row in found.rows if row.depth == 1 and row.module
                                     and row.module.startswith("embeddings"))  # fmt: skip
    assert rows["block 1"].shape == (2, n + cls_token, d)
    assert (rows["cls"].shape, rows["grid"].shape) == ((2, 1, d), (2, n, d))
    assert sum(row.parameters for row in rows.values()) == found.parameters == OmniAudioModel(config).num_parameters()
    assert sum(row.flops for row in rows.values()) == found.flops


def test_inspect_an_audio_encoder(encoder_folder: Path, files: list[str]) -> None:
    table = succeed("inspect", encoder_folder, "--depth", 0)
    assert "OmniAudioModel: input_features 1 x 101 x 20" in table
    report = json.loads(succeed("inspect", encoder_folder, files[0], "--batch", 2, "--json"))
    assert report["inputs"]["input_features"] == [2, 36, 20]
    assert report["image_size"] is None
    assert json.loads(succeed("inspect", "configs/audio_tiny.json", "--json"))["parameters"] == 2_158_464
    assert "leave out the image size" in refuse("inspect", encoder_folder, "--image-size", 32)
    assert "leave out the image size" in refuse("inspect", encoder_folder, files[0], "--image-size", 32)
    assert "expected one named 'signal'" in refuse("inspect", "checkpoints/omni_tiny", files[2])


def test_the_file_says_which_encoder_of_a_fused_model_is_inspected(folder: Path, files: list[str]) -> None:
    models = [json.loads(succeed("inspect", folder, file, "--json"))["model"] for file in files]
    assert models == ["OmniAudioModel", "OmniVisionModel", "SignalEncoder"]
    assert json.loads(succeed("inspect", folder, "--json"))["model"] == "OmniVisionModel"


def test_inspect_an_encoder_of_a_plug_in_in_a_fresh_process(
    site: list[str], files: list[str], tmp_path: Path, python: Callable[..., Any]
) -> None:
    from omni.loading.preprocessor import save_preprocessor

    bundle = registry.get_modality("signal")
    encoder = bundle.model_class(bundle.config_class())
    encoder.save_pretrained(tmp_path)
    save_preprocessor(bundle.preprocessor_class(), tmp_path)
    done = python("-m", "omni", "inspect", tmp_path, files[2], "--json", path=site)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["model"], report["parameters"]) == ("SignalEncoder", encoder.num_parameters())
    assert report["inputs"] == {"signal_values": [1, 12], "signal_lengths": [1]}
    frames = report["rows"][0]
    assert (frames["module"], frames["shape"], frames["flops"]) == ("frames", [1, 16, 3], 2 * 16 * 4 * 3)
    assert "as `probes`" in refuse("inspect", tmp_path)
