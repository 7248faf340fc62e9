"""A run that is killed at any moment, however often, ends with the weights of an uninterrupted run."""

import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from omni.training.checkpoints import CHECKSUMS, CheckpointDamageError, DiskFullError
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = {
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    CHECKSUMS,
}


def recipe(output: Path, **changes: Any) -> Recipe:
    """Ten steps of a tiny encoder with dropout, a checkpoint after each."""
    settings = json.loads((CONFIGS / "train_vision_tiny.json").read_text())
    settings |= {
        "model": {"config": {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64}},
        "arguments": {
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "save_steps": 1,
            "save_total_limit": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
            "seed": 3,
        },
        "evaluate": None,
        "output": str(output),
    }
    settings["train"]["count"] = 12  # so that an epoch ends in the middle
    return Recipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder):
        run(recipe(Path("out")))
    return folder / "out"


@pytest.fixture
def out(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be damaged; `recipe(out)` is what it was of."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, "out"))


def in_a_process(settings: Recipe, largest_file: int = resource.RLIM_INFINITY) -> int:
    """Start the run in a new process, which resumes an earlier one; its id.

    The system kills it while it writes more than `largest_file` bytes into one file.
    """
    child = os.fork()
    if child == 0:
        gc.freeze()  # or collecting garbage would copy the memory of all tests before into it
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
            torch.set_num_threads(1)
            run(settings, resume=True)
            status = 0
        finally:
            os._exit(status)
    return child


def whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there and can be read to its end."""
    names = {path.name for path in checkpoint.iterdir()}
    if not names >= FILES:
        return False
    load_file(checkpoint / "model.safetensors")
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    json.loads((checkpoint / "trainer_state.json").read_text())
    return True


def is_being_saved(run: Path) -> bool:
    try:
        return any((run / "trainer").glob("checkpoint-*/*"))
    except FileNotFoundError:  # it is done, and has been renamed while we looked
        return True


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    started = time.monotonic()
    assert os.waitpid(in_a_process(recipe(straight)), 0)[1] == 0
    duration = time.monotonic() - started
    moments, kills, while_saving = random.Random(7), 0, 0
    for attempt in range(200):
        child = in_a_process(recipe(cut))
        if attempt % 2:
            time.sleep(moments.uniform(0.05, duration / 2))
        else:  # wait until a checkpoint is being written, and then a moment
            until = time.monotonic() + duration
            while time.monotonic() < until and not is_being_saved(cut / "run"):
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.01))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            break
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
        while_saving += any((cut / "run" / "trainer").glob("checkpoint-*/*"))
        assert all(whole(path) for path in (cut / "run").glob("checkpoint-*")), f"after kill {kills}"
    else:
        pytest.fail("200 attempts and no end")
    assert kills > 3
    assert while_saving > 0
    assert not list((cut / "run").glob(".*"))
    expected, found = (load_file(folder / "model.safetensors") for folder in (straight, cut))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    logs = [
        [(entry["step"], entry["loss"]) for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
        for state in (folder / "run" / "checkpoint-10" / "trainer_state.json" for folder in (straight, cut))
    ]
    assert logs[0] == logs[1]


def test_a_run_killed_while_it_writes_its_result_can_be_finished(out: Path) -> None:
    expected = load_file(out / "model.safetensors")
    half = (out / "model.safetensors").read_bytes()[:5000]  # as if the process had died before the rename
    saving = out.with_name("out.saving")
    saving.mkdir()
    (saving / "model.safetensors").write_bytes(half)
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
    run(recipe(out), resume=True)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not saving.exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_killed_while_it_writes_its_recipe_can_be_resumed(out: Path) -> None:
    written = (out / "run" / "recipe.json").read_bytes()
    status = os.waitpid(in_a_process(recipe(out), largest_file=len(written) // 2), 0)[1]
    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert (out / "run" / "recipe.json").read_bytes() == written
    run(recipe(out), resume=True)
    (out / "run" / "recipe.json").write_bytes(written[: len(written) // 2])
    with pytest.raises(RecipeError, match=r"The run cannot be resumed without a whole \S+run/recipe.json"):
        run(recipe(out), resume=True)
    (out / "run" / "recipe.json").unlink()
    with pytest.raises(RecipeError, match=r"cannot be resumed without a whole \S+run/recipe.json .*No such file"):
        run(recipe(out), resume=True)


def test_only_so_many_checkpoints_are_kept_and_the_best_is_one_of_them(finished: Path, tmp_path: Path) -> None:
    kept = sorted(path.name for path in (finished / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-10", "checkpoint-9"]
    arguments = recipe(tmp_path).arguments | {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 1.0,
        "max_steps": 5,
    }
    optimizer = {"name": "adamw", "lr": 3.0}  # gets worse: the first is the best
    worse = recipe(tmp_path / "best", arguments=arguments, optimizer=optimizer, evaluate={"split": "test", "count": 4})
    run(worse)
    folder = tmp_path / "best" / "run"
    state = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == folder
    assert whole(best)
    assert len(list(folder.glob("checkpoint-*"))) <= 3
    expected, found = load_file(best / "model.safetensors"), load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(expected[f"encoder.{name}"], found[name]) for name in found)


def test_another_recipe_is_not_resumed(out: Path) -> None:
    changed = recipe(out, optimizer={"name": "muon", "lr": 0.5})
    with pytest.raises(ValueError, match="began with other settings of optimizer; resume it with the recipe in"):
        run(changed, resume=True)
    shutil.rmtree(out / "run" / "checkpoint-10")
    assert get_last_checkpoint(str(out / "run")) == str(out / "run" / "checkpoint-9")
    run(recipe(out), resume=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_has_lost_something_is_not_resumed(name: str, out: Path) -> None:
    """`Trainer` would begin with a new optimizer, a new schedule or other random numbers, and say nothing."""
    straight = load_file(out / "model.safetensors")
    shutil.rmtree(out / "run" / "checkpoint-10")
    damaged = out / "run" / "checkpoint-9" / name
    whole_file = damaged.read_bytes()
    middle = len(whole_file) // 2
    flipped = whole_file[:middle] + bytes([whole_file[middle] ^ 1]) + whole_file[middle + 1 :]
    for change in (
        damaged.unlink,
        lambda: damaged.write_bytes(whole_file[:middle]),
        lambda: damaged.write_bytes(flipped),
    ):
        change()
        with pytest.raises(CheckpointDamageError, match=r"run/checkpoint-9 is damaged \(.+\); remove this folder"):
            run(recipe(out), resume=True)
    damaged.write_bytes(whole_file)
    found = load_file(run(recipe(out), resume=True) / "model.safetensors")
    assert all(torch.equal(straight[key], found[key]) for key in straight)


def test_half_of_the_weights_are_not_resumed(out: Path) -> None:
    weights = out / "run" / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointDamageError, match=r"run/checkpoint-10 is damaged"):
        run(recipe(out), resume=True)


def test_a_finished_checkpoint_is_not_overwritten(out: Path) -> None:
    before = (out / "model.safetensors").read_bytes()
    for checkpoint in (out / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds a finished checkpoint already; name another output"):
            run(recipe(out), resume=resume)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_full_disk_loses_no_checkpoint(finished: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", small]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(
            DiskFullError, match="There is no room left for a checkpoint in .*; make some, and continue with"
        ):
            run(recipe(small / "out"))
        checkpoints = list((small / "out" / "run").glob("checkpoint-*"))
        assert checkpoints
        assert all(whole(path) for path in checkpoints)
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        found = load_file(run(recipe(small / "out"), resume=True) / "model.safetensors")
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
    straight = load_file(finished / "model.safetensors")
    assert all(torch.equal(straight[key], found[key]) for key in straight)
