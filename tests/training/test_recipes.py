"""Every shipped recipe, followed for two steps and an evaluation, and interrupted and resumed, on smaller batches."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from omni.training.recipe import Recipe
from omni.training.run import run

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("train_*.json"))
SHIPPED = {"runs/vision_scenes": "checkpoints/vision_tiny", "runs/omni_scenes": "checkpoints/omni_tiny"}
"""What a first stage makes, and what stands for it."""


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_can_be_followed(
    path: Path, small: Path, pictures: Path, hummed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = json.loads(path.read_text())
    assert all(settings["about"].values())
    overrides: dict[str, Any] = {"output": str(tmp_path / "out")}
    overrides |= {"arguments.dataloader_num_workers": 0, "arguments.dataloader_prefetch_factor": None}
    overrides |= {"arguments.max_steps": 2, "arguments.eval_steps": 2, "arguments.logging_steps": 1}
    overrides |= {"arguments.per_device_train_batch_size": 4, "arguments.per_device_eval_batch_size": 4}
    overrides |= {"arguments.save_strategy": "no", "arguments.report_to": "none", "arguments.warmup_steps": 0}
    if "lr_scheduler_kwargs" in settings["arguments"]:
        overrides["arguments.lr_scheduler_kwargs.num_decay_steps"] = 1
    for key in ("checkpoint", "encoder"):
        if settings["model"].get(key) in SHIPPED:
            overrides[f"model.{key}"] = SHIPPED[settings["model"][key]]
    if settings["model"].get("image", {}).get("encoder") in SHIPPED:
        overrides["model.image.encoder"] = SHIPPED[settings["model"]["image"]["encoder"]]
    if settings["model"].get("checkpoint") == "runs/omni_aligned":
        overrides["model.checkpoint"] = str(small / "omni_hearing")
    for part in ("train", "evaluate"):
        if "voices" in settings[part]:
            overrides |= {f"{part}.voices": str(hummed), f"{part}.count": 40}
        if "path" in settings[part]:
            overrides[f"{part}.path"] = str(pictures)
        elif part == "evaluate":
            overrides["evaluate.count"] = 4
    monkeypatch.chdir(ROOT)
    made = run(Recipe.read(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()]))
    history = json.loads((made / "run" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert any("eval_loss" in entry for entry in history)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_an_interrupted_run_of_a_shipped_recipe_is_resumed(
    path: Path, small: Path, pictures: Path, hummed: Path, tmp_path: Path
) -> None:
    """With the same recipe: what libraries do to what they are given must not make it another one."""
    settings = json.loads(path.read_text())
    settings["arguments"] |= {"max_steps": 2, "save_steps": 1, "logging_steps": 1, "eval_strategy": "no"}
    settings["arguments"] |= {"save_strategy": "steps"}
    settings["arguments"] |= {"per_device_train_batch_size": 2, "warmup_steps": 0, "report_to": "none"}
    settings["arguments"] |= {"dataloader_num_workers": 0, "dataloader_prefetch_factor": None, "use_cpu": True}
    if "lr_scheduler_kwargs" in settings["arguments"]:
        settings["arguments"]["lr_scheduler_kwargs"]["num_decay_steps"] = 1
    model = settings["model"]
    hears = model.get("checkpoint") == "runs/omni_aligned"
    model |= {key: str(small / name) for key, name in (("checkpoint", "omni"), ("encoder", "encoder")) if key in model}
    if hears:
        model["checkpoint"] = str(small / "omni_hearing")
    if "modalities" in model:
        model["modalities"]["audio"] |= {"encoder": str(small / "hearing"), "factor": 1}  # its words are bytes
    if settings["objective"] == "transcription":
        model["config"] |= {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        }
    if "encoder" in model.get("image", {}):
        model["image"]["encoder"] = str(small / "encoder")
    if "thinker" in model:
        model |= {"thinker": str(small / "thinker.json"), "vocab_size": 400}
    if "text" in model:
        model["text"] |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
        model["config"] |= {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}
    if "voices" in settings["train"]:
        settings["train"]["voices"] = str(hummed)
    settings["train"] |= {"path": str(pictures)} if "path" in settings["train"] else {"count": 16}
    recipe = Recipe.model_validate(settings | {"evaluate": None, "output": str(tmp_path)})
    before = recipe.model_dump_json()
    run(recipe)
    assert recipe.model_dump_json() == before
    (weights,) = tmp_path.glob("*.safetensors")
    expected = load_file(weights)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")  # as if killed after the first step
    for file in tmp_path.glob("*.*"):
        file.unlink()
    run(recipe, resume=True)
    found = load_file(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
