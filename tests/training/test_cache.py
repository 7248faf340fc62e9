"""A frozen encoder's tokens from the cache train what the encoder itself trains, in the second epoch and in any process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run

ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 4,
    "eval_strategy": "epoch",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "seed": 0,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: dict[str, Any], tiny_thinker: dict[str, Any]) -> Path:
    """A small fused model, and pictures with answers; some rows have two pictures, one has none."""
    folder = tmp_path_factory.mktemp("cache")
    about = dict.fromkeys(("makes", "hardware", "time", "expect"), "-")
    common = {"about": about, "train": {"count": 4}, "optimizer": {"lr": 1e-3}}
    arguments = {**ARGUMENTS, "eval_strategy": "no", "max_steps": 1}
    encoder = run(
        Recipe.model_validate(
            {**common, "objective": "dense", "model": {"config": tiny_encoder}, "arguments": arguments}
            | {"output": str(folder / "encoder")}
        )
    )
    (folder / "thinker.json").write_text(json.dumps(tiny_thinker))
    model = {"thinker": str(folder / "thinker.json"), "vocab_size": 400}
    model["image"] = {"encoder": str(encoder), "output": "cls+grid", "projector": "unshuffle_mlp", "factor": 2}
    common["train"]["questions"] = 2  # type: ignore[index]
    run(
        Recipe.model_validate(
            {**common, "objective": "answers", "model": model, "arguments": arguments, "output": str(folder / "omni")}
        )
    )
    rows = []
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        shown = [f"{i}.png", "0.png"] if i % 3 == 0 else [f"{i}.png"] if i != 4 else []
        content = [*({"type": "image", "image": name} for name in shown), {"type": "text", "text": "what is it"}]
        answer = ("a cat", "a dog", "a bird")[i % 3]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(
    start: Path, output: Path, cache: Path | None, arguments: dict[str, Any] | None = None, **changes: Any
) -> Path:
    data = {"path": str(start / "rows.jsonl"), **({"cache": str(cache)} if cache else {})}
    recipe = {
        "about": dict.fromkeys(("makes", "hardware", "time", "expect"), "-"),
        "objective": "answers",
        "model": {"checkpoint": str(start / "omni")},
        "train": data,
        "evaluate": data,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "freeze": ["image_tower"],
        "arguments": ARGUMENTS | (arguments or {}),
        "output": str(output),
    }
    return run(Recipe.model_validate(recipe | changes))


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "run" / "history.json").read_text())
    return [float(entry[key]) for entry in history for key in ("loss", "eval_loss") if key in entry]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_the_cache_is_the_same_training(start: Path, tmp_path: Path, workers: int) -> None:
    arguments = {"dataloader_num_workers": workers}
    plain = train(start, tmp_path / "plain", None, arguments)
    cached = train(start, tmp_path / "cached", tmp_path / "cache", arguments)
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert len(entries) == 7  # eight pictures, one of which no row shows
    torch.testing.assert_close(losses(cached), losses(plain), rtol=1e-4, atol=1e-4)
    one, other = (load_file(folder / "model.safetensors") for folder in (plain, cached))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
    again = train(start, tmp_path / "again", tmp_path / "cache", arguments)
    assert losses(again) == losses(cached)
    assert {path for path in (tmp_path / "cache").rglob("*") if path.is_file()} == entries.keys()


def test_an_encoder_that_learns_has_no_cache(start: Path, tmp_path: Path) -> None:
    for freeze in ([], ["image_tower.layers"]):
        with pytest.raises(RecipeError, match=r"add \"image_tower\" to `freeze`, or drop `cache`"):
            train(start, tmp_path / "out", tmp_path / "cache", freeze=freeze)
    with pytest.raises(ValueError, match="`cache` is for the objective 'answers'"):
        text = {"model_type": "bert"}
        train(start, tmp_path / "out", tmp_path / "cache", objective="contrastive", model={"text": text})
