"""Rows of pictures, sounds and a toy modality, mixed: read, checked, trained on, cached and evaluated; or refused."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from omni import (
    OmniAudioConfig,
    OmniAudioModel,
    OmniFeatureExtractor,
    OmniImageProcessor,
    OmniVisionConfig,
    OmniVisionModel,
    registry,
)
from omni.cli.app import app
from omni.data.checking import check
from omni.data.conversations import ExampleError
from omni.data.manifests import Manifest, ManifestConversations
from omni.data.sources import ManifestError
from omni.evaluation import EvaluationError, ManifestSettings, Result, evaluate, render, write_sheet
from omni.evaluation.manifest import ManifestQuestions
from omni.loading.preprocessor import save_preprocessor
from omni.modality import ItemError, Modality
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run

pytest.importorskip("soundfile")
PLUGIN = Path(__file__).parents[1] / "plugins" / "omni_signal" / "omni_signal" / "plugin.py"
ARGUMENTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 3,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "seed": 0,
}


def read_signal(source: Any) -> np.ndarray:
    """The toy's files: raw float32."""
    try:
        return np.frombuffer(source if isinstance(source, bytes) else Path(source).read_bytes(), np.float32)
    except (OSError, ValueError) as error:
        raise ItemError(f"{source!r} is no signal ({error}).") from error


@pytest.fixture(scope="module", autouse=True)
def signal() -> Iterator[Modality]:
    """A modality that omni does not know, whose items come from files."""
    spec = importlib.util.spec_from_file_location("omni_signal.plugin", PLUGIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with registry.temporary():
        registry.register_modality(
            replace(
                module.signal,
                open=read_signal,
                suffixes=(".sig",),
                noun="signal",
                stand_ins=lambda item, seed: {"blank": 0 * item, "noise": 0 * item + 1},
            )
        )
        module.SignalEncoder(module.SignalConfig())
        yield module.signal


ROWS: list[dict[str, Any]] = [
    {"image": ["0.png", "1.png"], "audio": "0.wav", "question": "<audio> is <image> or <image>", "answer": "one"},
    {"audio": ["1.wav", "2.wav"], "answer": "a spoken question about a sound"},
    {"image": "2.png", "audio": "3.wav", "question": "", "answer": "a spoken question"},
    {"file_name": "4.wav", "caption": "a tone"},
    {"file_names": ["3.png", "5.wav"], "signal": "0.sig", "question": "all of it", "answer": "yes"},
    {"signals": ["1.sig", "2.sig"], "caption": "two"},
    {"image": "4.png", "caption": "noise"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    {
        "audio": "6.wav",
        "messages": [
            {"role": "user", "content": [{"type": "audio", "path": "7.wav"}, {"type": "text", "text": "then <audio>"}]},
            {"role": "assistant", "content": "two sounds"},
            {"role": "user", "content": [{"type": "signal", "signal": "3.sig"}]},
            {"role": "assistant", "content": "a signal"},
        ],
    },
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, signal: Modality, tiny_thinker: dict[str, Any]) -> Path:
    """Rows with their files, a Thinker, and an encoder of each modality."""
    import soundfile

    folder = tmp_path_factory.mktemp("mixed")
    for i in range(8):
        random = np.random.default_rng(i)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        soundfile.write(folder / f"{i}.wav", random.normal(0, 0.1, 1600 + 320 * i), 16_000)
        (folder / f"{i}.sig").write_bytes(random.normal(size=8 + 4 * i).astype(np.float32).tobytes())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "thinker.json").write_text(json.dumps(tiny_thinker))
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    OmniVisionModel(OmniVisionConfig(image_size=16, patch_size=8, **size)).save_pretrained(folder / "image")
    OmniImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "image")
    OmniAudioModel(OmniAudioConfig(stem_channels=8, **size)).save_pretrained(folder / "audio")
    OmniFeatureExtractor().save_pretrained(folder / "audio")
    signal.model_class(signal.config_class()).save_pretrained(folder / "signal")
    save_preprocessor(signal.preprocessor_class(gain=2.0), folder / "signal")
    return folder


def recipe(folder: Path, output: Path, **changes: Any) -> Recipe:
    sections = {name: {"encoder": str(folder / name), "projector": "mlp"} for name in ("image", "audio", "signal")}
    sections["signal"]["output"] = "grid"
    settings = {
        "objective": "answers",
        "model": {"thinker": str(folder / "thinker.json"), "vocab_size": 400, "modalities": sections},
        "train": {"path": str(folder / "rows.jsonl")},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "arguments": ARGUMENTS,
        "output": str(output),
    }
    return Recipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe(folder, tmp_path_factory.mktemp("trained") / "out"))


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "run" / "history.json").read_text())
    return [float(entry["loss"]) for entry in history if "loss" in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- Rows -------------------------------------------------------------------------------------------------------------


def written(message: dict[str, Any]) -> str:
    return "".join(block.get("text", f"<{block['type']}>") for block in message["content"])


def test_items_stand_where_placeholders_are_or_else_first_in_the_order_of_the_row(folder: Path) -> None:
    manifest = Manifest.read(folder / "rows.jsonl")
    assert [[written(message) for message in row.conversation][::2] for row in manifest] == [
        ["<audio> is <image> or <image>"],
        ["<audio><audio>"],
        ["<image><audio>"],
        ["<audio>Describe the sound."],
        ["<image><audio><signal>all of it"],
        ["<signal><signal>Describe the signal."],
        ["<image>Describe the picture."],
        ["hi"],
        ["<audio>then <audio>", "<signal>"],
    ]
    assert [(file.modality, file.path.name) for file in manifest[0].files] == [
        ("audio", "0.wav"),
        ("image", "0.png"),
        ("image", "1.png"),
    ]
    assert [file.path.name for file in manifest[8].files] == ["7.wav", "6.wav", "3.sig"]
    items = ManifestConversations(manifest)[4].items
    assert [(name, len(each)) for name, each in items.items()] == [("image", 1), ("audio", 1), ("signal", 1)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "twice": ({"audio": "0.wav", "audios": ["0.wav"], "answer": "x"}, "sounds should be named once, found 'audio' and"),
    "by suffix, too": ({"file_name": "0.wav", "audio": "0.wav", "answer": "x"}, "sounds should be named once"),
    "no item": ({"answer": "x"}, "expected an item beside `answer`, found none"),
    "placeholder": (
        {"image": "0.png", "question": "<audio> is what", "answer": "x"},
        "a placeholder <audio> for each of 0 sounds, found 1",
    ),
    "unmarked": (
        {"audio": "0.wav", "messages": ROWS[7]["messages"]},
        "a placeholder <audio> for each of 1 sounds, found 0",
    ),
    "file in a block of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "audio": "0.wav"}]}]},
        "names no file as 'audio'",
    ),
    "file of another type": (
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "0.png", "audio": "0.wav"}]}]},
        "a block of type 'image' names no file as 'audio'",
    ),
    "beside the content": (
        {"messages": [{"role": "user", "content": "x", "audio": "0.wav"}]},
        "not as 'audio' here",
    ),
    "an answer with a sound": (
        {"audio": "0.wav", "messages": [ROWS[7]["messages"][0], {"role": "assistant", "content": "hear <audio>"}]},
        "message 2 is an answer with a sound",
    ),
    "address": ({"audio": "https://x.org/a.wav", "answer": "x"}, "download the sound first"),
    "no words in the answer": ({"audio": "0.wav", "answer": " "}, "`answer` is empty"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_with_a_row_of_sounds_is_one_sentence(fault: str, folder: Path) -> None:
    row, words = BAD[fault]
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (ROWS[0], row)))
    with pytest.raises(ManifestError, match=rf"bad.jsonl, line 2: .*{words}.*\.$"):
        Manifest.read(path)[1]


def test_a_modality_that_opens_no_files_is_refused_and_not_dropped(folder: Path, signal: Modality) -> None:
    with registry.temporary():
        registry._registered["signal"] = replace(signal, open=None)
        (folder / "closed.jsonl").write_text(json.dumps({"signal": "0.sig", "image": "0.png", "caption": "x"}))
        with pytest.raises(ManifestError, match="'signal' cannot be read: The modality 'signal' opens no files"):
            Manifest.read(folder / "closed.jsonl")


def test_a_file_whose_suffix_says_nothing_is_what_the_others_are(folder: Path, tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}").write_bytes((folder / f"{number}.wav").read_bytes())
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps({"file_name": f"{n}", "text": "x"}) + "\n" for n in range(2)))
    assert [row.files[0].modality for row in Manifest.read(tmp_path)] == ["audio", "audio"]
    (tmp_path / "0.png").write_bytes((folder / "0.png").read_bytes())
    path.write_text("".join(json.dumps({"file_name": name, "text": "x"}) + "\n" for name in ("0", "0.png")))
    assert [row.files[0].modality for row in Manifest.read(tmp_path)] == ["image", "image"]


def test_folders_of_sounds_are_classes(folder: Path, tmp_path: Path) -> None:
    for name, number in (("low", 0), ("high", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.wav").write_bytes((folder / f"{number}.wav").read_bytes())
    manifest = Manifest.read(tmp_path)
    assert [written(row.conversation[0]) for row in manifest] == ["<audio>Describe the sound."] * 2
    (tmp_path / "loose.wav").write_bytes(b"")
    with pytest.raises(ManifestError, match="found 'high', 'loose.wav', 'low'"):
        Manifest.read(tmp_path)


# --- check-data -------------------------------------------------------------------------------------------------------


def test_check_data_counts_and_compares_files_of_every_modality(folder: Path, tmp_path: Path, trained: Path) -> None:
    import soundfile

    from omni import OmniProcessor

    clean = check({"train": Manifest.read(folder / "rows.jsonl")}, OmniProcessor.from_pretrained(trained))
    notes = [(problem.kind, problem.source.rpartition(" ")[2]) for problem in clean.problems]
    assert notes == [("text alone", "8"), ("no words", "2"), ("no words", "3"), ("no words", "9")]
    assert clean.clean
    assert clean.items == {"audio": 8, "image": 5, "signal": 4}
    assert clean.pictures == 5

    samples, rate = soundfile.read(folder / "0.wav", dtype="int16")
    soundfile.write(tmp_path / "same.flac", samples, rate)
    (tmp_path / "cut.wav").write_bytes((folder / "1.wav").read_bytes()[:500])
    (tmp_path / "0.sig").write_bytes((folder / "0.sig").read_bytes())
    files = {"audio": ["same.flac", "cut.wav", folder / "0.wav"], "signal": ["0.sig", folder / "0.sig"]}
    rows = [{name: str(path), "caption": str(path)} for name, paths in files.items() for path in paths]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(app, ["check-data", str(tmp_path / "rows.jsonl"), "--json"])
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert [(problem["kind"], problem["source"][-1]) for problem in report["problems"]] == [
        ("truncated", "2"),
        ("duplicate sound", "3"),
        ("duplicate signal", "5"),
    ]
    assert (report["rows"], report["pictures"], report["items"]) == (5, 0, {"audio": 3, "signal": 2})


def test_a_model_without_ears_is_told_by_check_data(folder: Path, small: Path) -> None:
    from omni import OmniProcessor

    report = check({"train": Manifest.read(folder / "rows.jsonl")}, OmniProcessor.from_pretrained(small / "omni"))
    refused = [problem for problem in report.problems if problem.kind == "malformed row"]
    assert [problem.source[-1] for problem in refused] == ["1", "2", "3", "4", "5", "6", "9"]
    assert refused[0].sentence.startswith(
        "it cannot be read by the model: This model takes pictures, found a sound; leave it out"
    )


def test_an_item_that_cannot_be_prepared_is_named_with_its_row(folder: Path, trained: Path) -> None:
    from omni import OmniProcessor
    from omni.data.collate import ConversationCollator
    from omni.data.conversations import Example, ask

    def heard(name: str) -> Example:
        return Example({"audio": [folder / name]}, [ask("what", "a tone", ["audio"])], f"the row of {name}")

    collate = ConversationCollator(OmniProcessor.from_pretrained(trained))
    assert collate([heard("0.wav"), heard("1.wav")])["audio_mask"].shape[0] == 2
    with pytest.raises(ExampleError, match="the row of none.wav has an item that cannot be prepared: .*does not exist"):
        collate([heard("0.wav"), heard("none.wav")])


# --- Training ---------------------------------------------------------------------------------------------------------


def test_mixed_rows_train_every_part(folder: Path, trained: Path) -> None:
    found = weights(trained)
    for name in ("image", "audio", "signal"):
        before = load_file(folder / name / "model.safetensors")
        after = {
            key.removeprefix(f"model.{name}_tower."): value for key, value in found.items() if f"{name}_tower" in key
        }
        assert before.keys() == after.keys()
        assert not all(torch.equal(before[key], after[key]) for key in before), name
    assert len(losses(trained)) == 4
    assert json.loads((trained / "config.json").read_text())["untrained"] == []
    assert "prompt" not in json.loads((trained / "processor_config.json").read_text())


def test_frozen_towers_of_every_modality_are_cached(folder: Path, trained: Path, tmp_path: Path) -> None:
    def train(name: str, freeze: list[str], cache: bool = True) -> Path:
        data = {"path": str(folder / "rows.jsonl"), **({"cache": str(tmp_path / "cache")} if cache else {})}
        changes = {"model": {"checkpoint": str(trained)}, "freeze": freeze}
        return run(recipe(folder, tmp_path / name, train=data, **changes))

    plain, cached = train("plain", ["_tower"], cache=False), train("cached", ["_tower"])
    np.testing.assert_allclose(losses(cached), losses(plain), rtol=1e-4)
    entries = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(entries) == 8 + 5 + 4
    again = train("again", ["_tower"])
    assert losses(again) == losses(cached)
    train("only", ["audio_tower"])  # the others learn, and are not cached
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == len(entries)
    with pytest.raises(RecipeError, match='add "audio_tower" or "image_tower" or "signal_tower" to `freeze`'):
        train("none", ["audio_projector"])


def test_train_refuses_rows_that_the_model_does_not_take(folder: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExampleError,
        match=r"rows.jsonl, line 1 cannot be read by the model: This model takes pictures, found a sound; leave",
    ):
        run(recipe(folder, tmp_path / "out", model={"checkpoint": str(small / "omni")}))
    text = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    section = {"text": text, "encoder": str(folder / "image")}
    rows = [{"image": f"{i}.png", "caption": f"{i}"} for i in range(3)]
    rows.append({"image": "3.png", "audio": "0.wav", "question": "x", "answer": "y"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ARGUMENTS | {"per_device_train_batch_size": 4, "max_steps": 1}
    data = {"path": str(folder / "captions.jsonl")}
    with pytest.raises(
        ExampleError, match=r"line 4 cannot be read by the model: This model takes pictures, found a sound"
    ):
        run(recipe(folder, tmp_path / "c", objective="contrastive", model=section, train=data, arguments=arguments))
    with pytest.raises(
        RecipeError, match=r"`model.modalities.audio` .* the checkpoint has no modality 'audio', so give"
    ):
        audio = {"audio": {"projector": "mlp"}}
        run(recipe(folder, tmp_path / "d", model={"checkpoint": str(small / "omni"), "modalities": audio}))
    with pytest.raises(RecipeError, match=r"`model.modalities.audio.encoder` .* holds a model of type 'omni_vision'"):
        sections = {"audio": {"encoder": str(folder / "image")}}
        run(recipe(folder, tmp_path / "e", model={"thinker": str(folder / "thinker.json"), "modalities": sections}))


def test_sections_of_a_checkpoint_change_their_own_modality(folder: Path, trained: Path) -> None:
    from omni.training.fused import build_omni

    old, _ = build_omni(checkpoint=str(trained))
    changes = {"audio": {"projector": "linear"}, "signal": {"encoder": str(folder / "signal")}}
    new, processor = build_omni(checkpoint=str(trained), modalities=changes)
    assert new.config.modalities["audio"]["projector"] == "linear"
    changed = {
        name.split(".")[1]
        for name in {**old.state_dict(), **new.state_dict()}
        if name not in old.state_dict()
        or name not in new.state_dict()
        or not torch.equal(old.state_dict()[name], new.state_dict()[name])
    }
    assert changed == {"audio_projector", "signal_tower"}
    assert sorted(processor.preprocessors) == ["audio", "image", "signal"]


def test_a_checkpoint_gets_a_modality_that_it_lacks(folder: Path, small: Path) -> None:
    from omni.data.conversations import ask
    from omni.training.fused import build_omni

    section = {"encoder": str(folder / "signal"), "projector": "linear", "output": "grid"}
    old, _ = build_omni(checkpoint=str(small / "omni"))
    new, processor = build_omni(checkpoint=str(small / "omni"), modalities={"signal": section})
    assert set(new.config.modalities) == {"image", "signal"}
    assert "signal_projector" in new.config.untrained
    assert processor.preprocessors["signal"].gain == 2.0
    vocabulary = old.config.text_config.vocab_size
    for name, tensor in old.state_dict().items():
        found = new.state_dict()[name]
        assert torch.equal(found[:vocabulary] if len(found) > vocabulary else found, tensor), name
    tower = load_file(folder / "signal" / "model.safetensors")
    assert all(torch.equal(new.state_dict()[f"model.signal_tower.{name}"], value) for name, value in tower.items())
    text = processor.apply_chat_template(ask("which", items=["signal", "image"]))
    assert text == "<|user|><signal><image>which"


# --- Evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.new_chats
def test_every_modality_has_its_own_sight_test(folder: Path, trained: Path, tmp_path: Path) -> None:
    settings = ManifestSettings(data=str(folder / "rows.jsonl"), sight=True, max_new_tokens=4)
    outcome = evaluate(trained, settings)
    result = outcome.result
    assert [asked.question for asked in outcome.asked][:3] == ["is   or", "", ""]
    assert [score.n for score in result.scores] == [10]
    assert list(result.sight_tests) == ["image", "audio", "signal"]
    assert result.sight is not None
    assert list(result.sight.overall) == ["real", "blank", "noise"]  # no other row has two pictures
    assert "line 1 has 2 pictures, and no other row has as many" in result.sight.left_out["swapped"]
    assert list(result.senses["audio"].overall) == ["real", "blank", "swapped", "noise"]
    result.write(tmp_path / "result.json")
    assert Result.read(tmp_path / "result.json") == result
    header = [str(column.header) for column in render(result).columns]
    assert header[5:8] == ["blank picture", "noise picture", "blank sound"]
    write_sheet(tmp_path / "sheet.html", outcome)
    page = (tmp_path / "sheet.html").read_text()
    assert page.count('alt="picture') == 5
    assert page.count('alt="sound') == 8
    assert page.count("<p>signal") == 4


def test_one_modality_is_replaced_and_the_others_are_real(folder: Path) -> None:
    from omni.evaluation.asking import shown

    questions = ManifestQuestions(folder / "rows.jsonl")
    example = questions[2]
    silent = shown(questions, 2, example, "blank", "audio")
    assert silent["image"] is example.items["image"]
    assert not silent["audio"][0].samples.any()
    assert len(silent["audio"][0].samples) == len(example.items["audio"][0].samples)
    other = shown(questions, 2, example, "swapped", "audio")["audio"][0]
    assert np.array_equal(other.samples, questions[3].items["audio"][0].samples)
    assert shown(questions, 7, questions[7], "blank", "audio") == {}
    both = shown(questions, 2, example, "blank")
    assert (np.asarray(both["image"][0]) == 128).all()
    assert not both["audio"][0].samples.any()


def test_evaluate_refuses_rows_that_the_model_does_not_take(folder: Path, small: Path) -> None:
    with pytest.raises(
        EvaluationError, match=r"rows.jsonl cannot be read by the model: This model takes pictures, found a sound"
    ):
        evaluate(small / "omni", ManifestSettings(data=str(folder / "rows.jsonl")))
