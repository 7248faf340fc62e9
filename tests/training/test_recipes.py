"""Every shipped recipe, followed for two steps and an evaluation, on smaller batches than it names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omni.training.recipe import Recipe
from omni.training.run import run

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("train_*.json"))
SHIPPED = {"runs/vision_scenes": "checkpoints/vision_tiny", "runs/omni_scenes": "checkpoints/omni_tiny"}
"""What a first stage makes, and what stands for it."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two kinds, as many as a batch has."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        folder = root / ("dark", "bright")[number % 2]
        folder.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 60, (40, 30, 3))
        Image.fromarray((noise + 150 * (number % 2)).astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_followed(
    path: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.loads(path.read_text())
    assert all(settings["about"].values())
    overrides: dict[str, Any] = {"output": str(tmp_path / "out")}
    overrides |= {"arguments.dataloader_num_workers": 0, "arguments.dataloader_prefetch_factor": None}
    overrides |= {"arguments.max_steps": 2, "arguments.eval_steps": 2, "arguments.logging_steps": 1}
    overrides |= {"arguments.per_device_train_batch_size": 16, "arguments.per_device_eval_batch_size": 16}
    overrides |= {"arguments.save_strategy": "no", "arguments.report_to": "none", "arguments.warmup_steps": 0}
    if "lr_scheduler_kwargs" in settings["arguments"]:
        overrides["arguments.lr_scheduler_kwargs.num_decay_steps"] = 1
    for key in ("checkpoint", "encoder"):
        if settings["model"].get(key) in SHIPPED:
            overrides[f"model.{key}"] = SHIPPED[settings["model"][key]]
    if settings["model"].get("image", {}).get("encoder") in SHIPPED:
        overrides["model.image.encoder"] = SHIPPED[settings["model"]["image"]["encoder"]]
    for part in ("train", "evaluate"):
        if "path" in settings[part]:
            overrides[f"{part}.path"] = str(pictures)
        elif part == "evaluate":
            overrides["evaluate.count"] = 8
    monkeypatch.chdir(ROOT)
    made = run(Recipe.read(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()]))
    history = json.loads((made / "run" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert any("eval_loss" in entry for entry in history)
