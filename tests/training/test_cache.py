"""A frozen encoder's tokens from the cache train what the encoder itself trains, in the second epoch and in any process."""

import json
from collections.abc import Callable
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with answers; some rows have two pictures, one has none."""
    folder = tmp_path_factory.mktemp("cache")
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


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(folder: Path, small: Path) -> Train:
    """`train(output, cache, {argument: value}, section=...)`"""

    def train(output: Path, cache: Path | None, arguments: dict[str, Any] | None = None, **changes: Any) -> Path:
        data = {"path": str(folder / "rows.jsonl"), **({"cache": str(cache)} if cache else {})}
        recipe = {
            "about": dict.fromkeys(("makes", "hardware", "time", "expect"), "-"),
            "objective": "answers",
            "model": {"checkpoint": str(small / "omni")},
            "train": data,
            "evaluate": data,
            "optimizer": {"name": "adamw", "lr": 1e-2},
            "freeze": ["image_tower"],
            "arguments": ARGUMENTS | (arguments or {}),
            "output": str(output),
        }
        return run(Recipe.model_validate(recipe | changes))

    return train


@pytest.fixture(scope="module")
def plain(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained without a cache."""
    return train(tmp_path_factory.mktemp("plain") / "out", None)


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "run" / "history.json").read_text())
    return [float(entry[key]) for entry in history for key in ("loss", "eval_loss") if key in entry]


def written(cache: Path) -> dict[Path, int]:
    """Its files, each of which would be another one if it were written again."""
    return {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_the_cache_is_the_same_training(train: Train, plain: Path, tmp_path: Path, workers: int) -> None:
    arguments = {"dataloader_num_workers": workers}
    cached = train(tmp_path / "cached", tmp_path / "cache", arguments)
    entries = written(tmp_path / "cache")
    assert len(entries) == 7  # eight pictures, one of which no row shows
    torch.testing.assert_close(losses(cached), losses(plain), rtol=1e-4, atol=1e-4)
    one, other = (load_file(folder / "model.safetensors") for folder in (plain, cached))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
    again = train(tmp_path / "again", tmp_path / "cache", arguments)
    assert losses(again) == losses(cached)
    assert written(tmp_path / "cache") == entries


def test_an_encoder_that_learns_has_no_cache(train: Train, tmp_path: Path) -> None:
    for freeze in ([], ["image_tower.layers"]):
        with pytest.raises(RecipeError, match=r"add \"image_tower\" to `freeze`, or drop `cache`"):
            train(tmp_path / "out", tmp_path / "cache", freeze=freeze)
    with pytest.raises(ValueError, match="`cache` is for the objective 'answers'"):
        text = {"model_type": "bert"}
        train(tmp_path / "out", tmp_path / "cache", objective="contrastive", model={"text": text})
