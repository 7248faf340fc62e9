"""Every example runs as a user runs it, says what it shows, and stays short."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

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


def test_none_is_forgotten() -> None:
    assert {path.name for path in EXAMPLES} == {*EXPECTED, *LONG, *ELSEWHERE}
