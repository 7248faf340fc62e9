"""Every example runs as a user runs it, says what it shows, and stays short."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from omni import OmniVisionModel
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


def test_vision_world_is_trained_on_its_pictures(tmp_path: Path, python: Callable[..., Any]) -> None:
    """Three steps on small arrays: the encoder changes, and is saved with its image processor."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "emoji": random.integers(0, 256, (12, 72, 72, 4)),
        "emoji_labels": np.repeat(range(4), 3),
        "icons": random.integers(0, 256, (4, 72, 72, 4)),
        "photos": random.integers(0, 256, (4, 112, 112, 3)),
        "characters": random.integers(0, 256, (6, 72, 72)),
        "characters_labels": np.arange(6),
        "words": random.integers(0, 256, (6, 72, 72)),
        "words_labels": np.repeat(range(3), 2),
        "digits": random.integers(0, 256, (10, 28, 28)),
        "digits_labels": np.arange(10),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array.astype(np.int64 if name.endswith("labels") else np.uint8))
    emoji = [{"kind": kind, "sort": kind, "held_out": False} for kind in ("Flags", "Objects", "Objects", "Symbols")]
    (tmp_path / "emoji.json").write_text(json.dumps(emoji))
    script = (
        "import sys, torch.distributed as dist; from pathlib import Path\n"
        "sys.path.insert(0, 'examples/vision_world'); import train\n"
        "train.STORED, train.IDS, train.ICONS = 4, 3, 2\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1)\n"
        "done = iter([0.0, 0.5, 0.9, 1.0]); train.told = lambda value: next(done)\n"
        f"train.main(Path({str(tmp_path)!r}), Path({str(tmp_path / 'made')!r}), 1)\n"
    )
    run = python("-c", script)
    assert run.returncode == 0, run.stderr
    weights = [
        load_file(folder / "model.safetensors") for folder in (tmp_path / "made", Path("checkpoints/vision_tiny"))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(not tensor.equal(weights[1][name]) for name, tensor in weights[0].items())
    load_encoder(tmp_path / "made")


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
