"""Training in several processes: the same as in one, also where one has pictures and the other has not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve conversations: a third about one picture, a third about two, a third about none."""
    rows = []
    for number in range(12):
        names = [f"{number}-{i}.png" for i in range(number % 3)]
        for i, name in enumerate(names):
            pixels = np.random.default_rng(10 * number + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        content = [{"type": "image", "path": name} for name in names] + [{"type": "text", "text": "what is it"}]
        answer = " ".join(["red circle", "star", "it is blue"][: 1 + number % 2])
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def trained(
    processes: int, mixed: Path, folder: Path, encoder: dict[str, Any], thinker: dict[str, Any]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of a run of the command, each step on four rows in all."""
    from omni import OmniVisionConfig, OmniVisionModel

    folder.mkdir()
    torch.manual_seed(0)
    OmniVisionModel(OmniVisionConfig(**encoder)).save_pretrained(folder / "encoder")
    (folder / "thinker.json").write_text(json.dumps(thinker))
    recipe: dict[str, Any] = json.loads((CONFIGS / "train_omni_scenes.json").read_text())
    recipe |= {
        "model": {
            "thinker": str(folder / "thinker.json"),
            "vocab_size": 300,
            "image": {"encoder": str(folder / "encoder"), "output": "cls+grid", "projector": "linear"},
            "config": {"hidden_dropout_prob": 0.0},
        },
        "train": {"path": str(mixed)},
        "evaluate": None,
        "optimizer": {"name": "adamw", "lr": 0.003},
        "output": str(folder / "out"),
        "arguments": {
            "max_steps": 6,
            "per_device_train_batch_size": 4 // processes,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "seed": 5,
        },
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    ran = subprocess.run(
        [sys.executable, *launch, "-m", "omni", "train", str(folder / "recipe.json")],
        capture_output=True,
        text=True,
        timeout=240,  # a run that hangs
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    history = json.loads((folder / "out" / "run" / "history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry], load_file(folder / "out" / "model.safetensors")


def test_two_processes_learn_from_mixed_batches_what_one_learns(
    mixed: Path, tmp_path: Path, tiny_encoder: dict[str, Any], tiny_thinker: dict[str, Any]
) -> None:
    (losses_of_one, one), (losses_of_two, two) = (
        trained(n, mixed, tmp_path / str(n), tiny_encoder, tiny_thinker) for n in (1, 2)
    )
    assert len(losses_of_one) == 6
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=2e-3)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
