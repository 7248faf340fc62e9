"""A room that a reader may skip can be deleted: without its files, omni does everything else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.evaluation import Hashes, Result
from omni.scenes.evaluation import SceneSettings

ROOT = Path(__file__).resolve().parents[1]

WITHOUT_SCENES = """
import json, pkgutil, sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
import omni

root, here = Path(sys.argv[1]), Path.cwd()
assert Path(omni.__file__).parent == here / "omni"
for module in pkgutil.walk_packages(omni.__path__, "omni."):
    if module.name not in ("omni.__main__", "omni.serving.vllm_model"):  # a command, which starts; and what needs vLLM
        import_module(module.name)
assert not any(name.startswith("omni.scenes") for name in sys.modules)

from omni.loading.checkpoint import load
from omni.session import answer
from omni.vision.pictures import read_picture

omni_tiny, vision_tiny = str(root / "checkpoints/omni_tiny"), str(root / "checkpoints/vision_tiny")
model, processor = load(omni_tiny)
said = answer(model, processor, [read_picture(root / "examples/scene.png")], "what color is the circle")
assert said.answer == "red"

from omni.training.recipe import Recipe
from omni.training.run import run

few = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none", "use_cpu": True}
recipe = json.loads((root / "configs/train_pictures.json").read_text())
section = {"thinker": "thinker.json", "vocab_size": 300, "image": {"encoder": vision_tiny, "projector": "linear"}}
for number, changes in enumerate([{}, {"model": section}]):
    changes |= {"train": {"path": "pictures"}, "evaluate": None, "output": f"run{number}"}
    if not number:
        changes["model"] = {"checkpoint": omni_tiny}
    run(Recipe.model_validate(recipe | changes | {"arguments": few | {"remove_unused_columns": False}}))

from omni.evaluation import choose_settings, evaluate

outcome = evaluate(omni_tiny, choose_settings(omni_tiny, data="pictures", max_new_tokens=4))
assert outcome.result.score("answer").n == 4

from omni.cli.app import app
from typer.testing import CliRunner

for arguments in (
    ["train", str(root / "configs/train_omni_scenes.json")],
    ["train", str(root / "configs/train_vision_tiny.json")],
    ["evaluate", omni_tiny],
    ["evaluate", vision_tiny],
    ["evaluate", "--verify", "result.json"],
    *([["bench", "--verify", "--checkpoint", omni_tiny]] if find_spec("omni.fast") else []),
):
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("Error: ") and done.stderr.count("\\n") == 1, done.stderr
    assert "The pictures of scenes come from omni.scenes, which is not installed; install it, or" in done.stderr
"""


@pytest.mark.slow
def test_omni_works_when_its_scenes_are_deleted(tmp_path: Path, python: Callable[..., Any]) -> None:
    """It answers, learns from a folder of pictures and evaluates a manifest; what is about scenes says what is missing."""
    shutil.copytree(ROOT / "omni", tmp_path / "omni", ignore=shutil.ignore_patterns("scenes", "__pycache__"))
    for number in range(4):
        (folder := tmp_path / "pictures" / ("dark", "bright")[number % 2]).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 60, (40, 30, 3))
        Image.fromarray((noise + 150 * (number % 2)).astype(np.uint8)).save(folder / f"{number}.png")
    shapes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "thinker.json").write_text(json.dumps({"model_type": "llama", **shapes}))
    hashes = Hashes(**dict.fromkeys(Hashes.model_fields, "0" * 64))
    about = {"date": "", "seconds": 1, "versions": {}, "device": "cpu", "stopped": 0, "scores": []}
    Result(checkpoint="mine", settings=SceneSettings(), hashes=hashes, **about).write(tmp_path / "result.json")
    run = python("-c", WITHOUT_SCENES, ROOT, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


WITHOUT_SPEED = [
    "test_session.py",
    "embedding/test_engine.py",
    "fusion/test_acceleration.py",
    "fusion/test_modeling_omni.py",
    "vision/test_modeling_vision.py",
]
"""Tests of all that asks for speed."""


def test_omni_says_the_same_when_what_is_fast_is_deleted(
    tmp_path: Path, python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tests that compare with transformers and torch; those of `torch.compile`, which takes long, are left out."""
    shutil.copytree(ROOT / "omni", tmp_path / "omni", ignore=shutil.ignore_patterns("fast", "__pycache__"))
    code = f"""
import os, sys, omni, pytest
from importlib.util import find_spec
from typer.testing import CliRunner
from omni.cli.app import app

assert find_spec("omni.fast") is None
assert omni.__file__.startswith({str(tmp_path)!r})
os.chdir({str(ROOT)!r})
bench = CliRunner().invoke(app, ["bench", "--verify"], catch_exceptions=False)
assert (bench.exit_code, bench.stderr.count(chr(10))) == (2, 1)
assert bench.stderr.startswith("Error: The fast paths come from omni.fast, which is not installed; install it, or")
sys.exit(pytest.main(sys.argv[1:]))
"""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not long", "-k", "not compile"]
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    run = python("-c", code, *options, *(ROOT / "tests" / name for name in WITHOUT_SPEED), cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
