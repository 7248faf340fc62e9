"""Every example runs as a user runs it, says what it shows, and stays short."""

import ast
import importlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from omni import OmniProcessor, OmniVisionModel
from omni.loading.encoder import load_encoder

EXAMPLES = sorted(Path("examples").glob("*.py"))
EXPECTED = {
    "ask.py": ["red"],
    "compose.py": ["untrained: ['image_projector']", "into 5 tokens", "read 12 tokens"],
    "attention_mass.py": ["10 scenes", "vision_tiny, layer 4, head 2", "omni_tiny, Thinker, 5 questions"],
    "fuse_by_hand.py": ["projected       1 x 50 x 256", "tokens of the picture: 50 planned: 50", "next word: red"],
    "load_encoder.py": ["cls          (1, 1, 128)", "grid         (1, 196, 128)"],
    "pretrained_tower.py": ["projected    (17, 64)"],
    "register_encoder.py": ["'wave': 'registered by __main__'", "{'wave': (4, 256)}"],
    "two_pictures.py": ["tokens   5 to  54: a picture", "pixel_values (2, 3, 224, 224)"],
}
"""What each example must print."""
ELSEWHERE = {"ask_without_torch.py": "tests/exchange/test_onnx.py"}
"""Those that need something made first, and which test runs them."""
LONG = {"learn_digits.py": r"answer\D+360\D+(0\.\d+)"}
"""Those that train for minutes, and where they print how well it went."""


@pytest.mark.parametrize("example", [path for path in EXAMPLES if path.name in EXPECTED], ids=lambda path: path.stem)
def test_it_runs(example: Path, python: Callable[..., Any]) -> None:
    done = python(example)
    assert done.returncode == 0, done.stderr
    for line in EXPECTED[example.name]:
        assert line in done.stdout
    assert "[transformers]" not in done.stderr  # warnings: an example does nothing that deserves one


@pytest.mark.long
def test_the_shipped_model_learns_to_read_digits(tmp_path: Path) -> None:
    arguments = [sys.executable, "examples/learn_digits.py", str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = re.search(LONG["learn_digits.py"], done.stdout)
    assert found, done.stdout
    assert float(found[1]) >= 0.97


def test_it_takes_a_picture_and_a_question(python: Callable[..., Any]) -> None:
    done = python("examples/ask.py", "examples/scene.jpg", "what shape is the red object")
    assert done.stdout == "square\n", done.stderr


def test_the_task_of_lmms_eval_scores_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader(yaml.SafeLoader):
        """Reads `!function module.name` as lmms-eval does."""

    Loader.add_constructor("!function", lambda _, node: getattr(importlib.import_module("rows"), node.value[5:]))
    monkeypatch.syspath_prepend("examples/lmms_eval")
    task = yaml.load(Path("examples/lmms_eval/rows.yaml").read_text("utf-8"), Loader)
    shutil.copytree("examples", tmp_path / "drawings", ignore=shutil.ignore_patterns("*.py"))
    monkeypatch.chdir(tmp_path)
    row = {"image": "scene.png", "question": "what color is the circle", "answer": "red"}
    (picture,) = task["doc_to_visual"](row)
    assert (picture.mode, picture.size) == ("RGB", Image.open("drawings/scene.png").size)
    assert row[task["doc_to_text"]] == "what color is the circle"
    metric = task["metric_list"][0]["metric"]
    assert [task["process_results"](row, [said])[metric] for said in ("red ", "blue")] == [1.0, 0.0]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_run_it(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f"python examples/{example.name}" in (ast.get_docstring(ast.parse(text)) or "")


def write_world(folder: Path) -> None:
    """Small arrays, fonts and words in place of what examples/vision_world/pictures.py fetches."""
    chance = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "emoji": chance.integers(0, 256, (12, 72, 72, 4)),
        "emoji_labels": np.repeat(range(4), 3),
        "icons": chance.integers(0, 256, (4, 72, 72, 4)),
        "photos": chance.integers(0, 256, (4, 112, 112, 3)),
        "characters": chance.integers(0, 256, (6, 72, 72)),
        "characters_labels": np.arange(6),
        "words": chance.integers(0, 256, (6, 72, 72)),
        "words_labels": np.repeat(range(3), 2),
        "digits": chance.integers(0, 256, (10, 28, 28)),
        "digits_labels": np.arange(10),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.int64 if name.endswith("labels") else np.uint8))
    emoji = [{"kind": kind, "sort": kind, "held_out": False} for kind in ("Flags", "Objects", "Objects", "Symbols")]
    (folder / "emoji.json").write_text(json.dumps(emoji))
    fonts = folder / "fetched/fonts-dejavu-core"
    fonts.mkdir(parents=True)
    shutil.copy(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", fonts)
    english = folder / "fetched/an-array-of-english-words@2.0.0/package"
    english.mkdir(parents=True)
    (english / "index.json").write_text(json.dumps(["letter", "word", "spell", "unbelievable"]))


def test_vision_world_is_trained_on_its_pictures(tmp_path: Path, python: Callable[..., Any]) -> None:
    """Two steps on small arrays: the encoder changes, and is saved with its image processor; the next run goes on."""
    write_world(tmp_path)
    script = (
        "import sys; from pathlib import Path; from types import SimpleNamespace as Clock\n"
        "sys.path.insert(0, 'examples/vision_world'); import train\n"
        "train.STORED, train.IDS, train.ICONS, train.SHOWN, train.SPELLED = 4, 3, 2, 50, 2\n"
        "train.WORDS, train.PHOTOS, train.COPIED, train.SCENES = 1, 2, (4, 1, 1, 2), 2\n"
        "train.time = Clock(process_time=iter(map(float, sys.argv[1].split())).__next__)\n"
        f"train.main(Path({str(tmp_path)!r}), Path({str(tmp_path / 'made')!r}), 1)\n"
    )
    steps, weights = [], [load_file("checkpoints/vision_world/model.safetensors")]
    for clock in ("0 0 1 50 300 301", "1000 1001"):  # a step of some patches, one of all, saved; and none, from there
        run = python("-c", script, clock)
        assert run.returncode == 0, run.stderr
        steps.append(torch.load(tmp_path / "made/state.pt")["step"])
        weights.append(load_file(tmp_path / "made/model.safetensors"))
    assert steps == [2, 2]
    assert weights[0].keys() == weights[1].keys()
    assert all(not tensor.equal(weights[0][name]) for name, tensor in weights[1].items())
    assert all(tensor.equal(weights[2][name]) for name, tensor in weights[1].items())
    load_encoder(tmp_path / "made")


def test_a_printed_word_is_drawn_where_its_labels_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labelled half patches, side by side, spell the word."""
    monkeypatch.syspath_prepend("examples/vision_world")
    words = importlib.import_module("words")
    write_world(tmp_path)
    (font,) = words.fonts_in([tmp_path / "fetched"])
    photos = np.full((1, 112, 112, 3), 255, np.uint8)
    for seed, text in enumerate(("letter", "0x9", "mmmmwwww", "i")):
        picture, (letters, places) = words.drawn(text, font, random.Random(seed), photos)
        row = letters[(letters >= 0).any(1)][0]
        inside = row[(row >= 0) & (row < len(words.LETTERS))]
        order = places[(letters >= 0).any(1)][0]
        assert [words.LETTERS[n] for n, before in zip(inside, [-1, *inside], strict=False) if n != before] == [
            each for each, before in zip(text, " " + text, strict=False) if each != before
        ]
        assert sorted({*order} - {-100}) == list(range(len(text)))
        assert picture.size == (224, 224)


def test_the_start_of_omni_world_names_in_one_token_and_spells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("examples/vision_world")
    thinker = importlib.import_module("thinker")
    (tmp_path / "asked").mkdir()
    Image.new("RGB", (70, 70), "red").save(tmp_path / "asked/a.png")
    for kind, answer in (("name", "red square"), ("word", "square")):
        row = {"image": "a.png", "question": "what is it", "answer": answer, "kind": kind}
        (tmp_path / f"asked/{kind}s.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(thinker, "SOME", 2)
    thinker.main(tmp_path, tmp_path / "start", "checkpoints/vision_world")
    tokenizer = OmniProcessor.from_pretrained(tmp_path / "start").tokenizer
    written = {text: tokenizer(text)["input_ids"] for text in ("red square", "square", "what is it")}
    assert [len(tokens) for tokens in written.values()] == [1, 6, 3]
    assert [tokenizer.decode(tokens) for tokens in written.values()] == list(written)


def test_a_view_is_embedded_as_the_picture_that_it_is_enlarged_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend("examples/vision_world")
    train = importlib.import_module("train")
    encoder = OmniVisionModel.from_pretrained("checkpoints/vision_tiny")
    view = torch.rand(2, 3, 70, 70) * 255
    picture = torch.nn.functional.interpolate(view, size=224, mode="bilinear")
    with torch.no_grad():
        small, large = (train.embedded(encoder, pictures, 196) for pictures in (view, picture))
        assert torch.allclose(small, large, atol=1e-4)
        assert torch.allclose(small, encoder.embeddings(picture / 127.5 - 1), atol=1e-4)


def test_none_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES} == {*EXPECTED, *LONG, *ELSEWHERE}
