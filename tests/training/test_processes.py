"""Training in several processes, whole or sharded, equals training in one, also if only one of them has pictures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from omni import (
    OmniAudioConfig,
    OmniAudioModel,
    OmniFeatureExtractor,
    OmniForConditionalGeneration,
    OmniImageProcessor,
    OmniVisionConfig,
    OmniVisionModel,
)
from omni.training.parts import CHECKPOINTING
from omni.training.recipe import Recipe
from omni.training.run import run

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Twelve conversations: a third about one picture, a third about two, a third about none."""
    return write(tmp_path / "mixed.jsonl", [0, 1, 2] * 4)


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """Twelve conversations, all of them about a picture or two."""
    return write(tmp_path / "shown.jsonl", [1, 2] * 6)


def write(path: Path, pictures: list[int]) -> Path:
    """Conversations, each about so many pictures."""
    rows = []
    for number, count in enumerate(pictures):
        names = [f"{number}-{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            pixels = np.random.default_rng(10 * number + i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path.parent / name)
        content = [{"type": "image", "path": name} for name in names] + [{"type": "text", "text": "what is it"}]
        answer = " ".join(["red circle", "star", "it is blue"][: 1 + number % 2])
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets."""

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun would tell a single process."""


def start(command: list[str], environment: dict[str, str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)  # a run that hangs
    assert ran.returncode == 0, ran.stderr[-3000:]


def make_recipe(folder: Path, mixed: Path, encoder: dict[str, Any], thinker: dict[str, Any]) -> dict[str, Any]:
    """A recipe for a tiny model in a new folder, and what it needs."""
    folder.mkdir()
    torch.manual_seed(0)
    OmniVisionModel(OmniVisionConfig(**encoder)).save_pretrained(folder / "encoder")
    OmniImageProcessor().save_pretrained(folder / "encoder")
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
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 3,
            "use_cpu": True,
            "report_to": "none",
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "seed": 5,
        },
    }
    return recipe


def trained(
    processes: int,
    mixed: Path,
    folder: Path,
    encoder: dict[str, Any],
    thinker: dict[str, Any],
    sharded: bool = False,
    heard: bool = False,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of a run of the command, each step on four rows in all.

    One process is this one; several are started by torchrun. A run that is sharded is stopped in the middle and resumed, as
    if it had been killed while it wrote its result. One of rows that are heard, too, keeps few activations.
    """
    recipe = make_recipe(folder, mixed, encoder, thinker)
    recipe["arguments"] |= {
        "per_device_train_batch_size": 4 // processes,
        "save_strategy": "steps" if sharded else "no",
    }
    if heard:
        OmniAudioModel(OmniAudioConfig(**encoder, stem_channels=8)).save_pretrained(folder / "audio")
        OmniFeatureExtractor().save_pretrained(folder / "audio")
        recipe["model"]["modalities"] = {"audio": {"encoder": str(folder / "audio"), "projector": "linear"}}
        recipe["arguments"][CHECKPOINTING] = True
    (folder / "recipe.json").write_text(json.dumps(recipe))
    if processes == 1:
        run(Recipe.read(folder / "recipe.json"))
    else:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [str(Path(__file__).with_name("fsdp_on_cpu.py"))] if sharded else ["-m", "omni", "train"]
        command = [sys.executable, *launch, *command, str(folder / "recipe.json")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(FSDP if sharded else {})}
        start(command, environment)
        if sharded:
            shutil.rmtree(folder / "out" / "run" / "checkpoint-6")
            (folder / "out" / "model.safetensors").unlink()
            start([*command, "--resume"], environment)
    history = json.loads((folder / "out" / "run" / "history.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry], load_file(folder / "out" / "model.safetensors")


@pytest.mark.parametrize("sharded", [False, pytest.param(True, marks=pytest.mark.long)], ids=["whole", "sharded"])
def test_two_processes_learn_what_one_learns(
    mixed: Path, shown: Path, tmp_path: Path, tiny_encoder: dict[str, Any], tiny_thinker: dict[str, Any], sharded: bool
) -> None:
    data = shown if sharded else mixed
    losses_of_one, one = trained(1, data, tmp_path / "1", tiny_encoder, tiny_thinker)
    losses_of_two, two = trained(2, data, tmp_path / "2", tiny_encoder, tiny_thinker, sharded)
    assert len(losses_of_one) == 6
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=2e-3)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    OmniForConditionalGeneration.from_pretrained(tmp_path / "2" / "out")  # its fingerprints are of the whole weights


@pytest.mark.long
def test_two_processes_of_which_one_has_no_sounds_or_no_pictures(
    mixed: Path, tmp_path: Path, tiny_encoder: dict[str, Any], tiny_thinker: dict[str, Any]
) -> None:
    """In a step a process has some of the modalities, another has others or none; and activations are computed twice."""
    rows = []
    for number, line in enumerate(mixed.read_text().splitlines()):
        row = json.loads(line)
        if number % 4 in (2, 3):
            sound = np.random.default_rng(number).normal(0, 0.1, 1600).astype(np.float32)
            pytest.importorskip("soundfile").write(tmp_path / f"{number}.wav", sound, 16_000)
            row["messages"][0]["content"].insert(0, {"type": "audio", "path": f"{number}.wav"})
        rows.append(row)
    (tmp_path / "heard.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (losses_of_one, one), (losses_of_two, two) = (
        trained(n, tmp_path / "heard.jsonl", tmp_path / str(n), tiny_encoder, tiny_thinker, heard=True) for n in (1, 2)
    )
    np.testing.assert_allclose(losses_of_two, losses_of_one, rtol=2e-3)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=1e-3)


@pytest.mark.long
def test_what_cannot_be_sharded_is_refused(
    mixed: Path, tmp_path: Path, tiny_encoder: dict[str, Any], tiny_thinker: dict[str, Any]
) -> None:
    script = str(Path(__file__).with_name("fsdp_on_cpu.py"))
    refused = [
        (
            [script],
            {},
            "adamw",
            "Under FSDP every batch of every process needs all inputs, found one without pixel_values",
        ),
        ([script], {"FSDP_VERSION": "1"}, "adamw", "set --fsdp_version 2"),
        ([script], {}, "muon", "Muon needs them whole: choose adamw"),
        (["-m", "omni", "train"], {}, "adamw", "accelerate does not shard models on this device"),
    ]
    for number, (command, settings, optimizer, message) in enumerate(refused):
        folder = tmp_path / str(number)
        recipe = make_recipe(folder, mixed, tiny_encoder, tiny_thinker) | {
            "optimizer": {"name": optimizer, "lr": 0.003}
        }
        (folder / "recipe.json").write_text(json.dumps(recipe))
        ran = subprocess.run(
            [sys.executable, *command, str(folder / "recipe.json")],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", **FSDP, **settings, **ALONE},
        )
        assert ran.returncode != 0
        assert message in ran.stderr
