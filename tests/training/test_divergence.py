"""A run whose numbers are not finite stops with a sentence, and keeps its whole checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from omni.cli.app import app
from omni.training.checkpoints import CHECKSUMS, CheckpointDamageError, DivergenceError, _checksums, read_state
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(output: Path, encoder: dict[str, Any], lr: float, decay: float = 0.0, **arguments: Any) -> Recipe:
    """Four steps of a tiny encoder."""
    settings = json.loads((CONFIGS / "train_vision_tiny.json").read_text())
    settings |= {"model": {"config": encoder}, "evaluate": None, "output": str(output)}
    settings |= {"optimizer": {"name": "adamw", "lr": lr, "weight_decay": decay}, "train": {"count": 8}}
    settings["arguments"] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 1,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        **arguments,
    }
    return Recipe.model_validate(settings)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:
    with pytest.raises(
        DivergenceError, match=r"at step \d the loss is nan.* good checkpoint is .*checkpoint-\d"
    ) as said:
        run(recipe(tmp_path, tiny_encoder, 1e30))
    assert "Lower `optimizer.lr`" in str(said.value)
    assert not list(tmp_path.glob("*.*"))
    checkpoints = list((tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        read_state(checkpoint)
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_weights_that_are_not_finite_are_not_saved(strategy: str, tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:
    """After the last step there is no loss any more that would tell."""
    with pytest.raises(DivergenceError, match=r"holds numbers that are not finite.*no checkpoint was written before"):
        run(recipe(tmp_path, tiny_encoder, 1e20, 1e20, max_steps=1, save_strategy=strategy))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not list(tmp_path.glob("*.*"))


def test_the_command_tells_it_in_a_sentence(tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:
    (tmp_path / "recipe.json").write_text(recipe(tmp_path / "out", tiny_encoder, 1e30).model_dump_json())
    ended = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.json")])
    assert ended.exit_code == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("Error: The run diverged: at step")


def test_a_state_with_nan_is_neither_started_from_nor_resumed(tmp_path: Path, tiny_encoder: dict[str, Any]) -> None:
    settings = recipe(tmp_path / "out", tiny_encoder, 1e-3, max_steps=1)
    finished = run(settings)
    checkpoint = tmp_path / "out" / "run" / "checkpoint-1"
    for folder in (checkpoint, finished):
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values())).fill_(torch.nan)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / CHECKSUMS).write_text(json.dumps(_checksums(checkpoint)))
    with pytest.raises(CheckpointDamageError, match=r"cannot continue from \S+checkpoint-1: .* not finite"):
        run(settings, resume=True)
    config = json.loads((finished / "config.json").read_text())
    (finished / "config.json").write_text(json.dumps(config | {"fingerprints": None}))
    (finished / "seal.json").unlink()
    begun = settings.model_dump() | {"model": {"encoder": str(finished)}, "output": str(tmp_path / "other")}
    with pytest.raises(RecipeError, match="model.*hold NaN or infinity"):
        run(Recipe.model_validate(begun))
