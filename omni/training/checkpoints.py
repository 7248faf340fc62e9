"""The checkpoints of a run. Each is complete or does not exist, and is verified before a run continues from it.

run/trainer/checkpoint-8    `Trainer` writes here
run/checkpoint-8            the complete checkpoint with `checksums.json`, moved here in one step if all numbers are finite
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

SAVING, DELETING, CHECKSUMS = ".saving", ".deleting", "checksums.json"


class CheckpointDamageError(RuntimeError):
    """A run cannot continue from a checkpoint: files are missing, changed or unreadable."""


class DiskFullError(OSError):
    """There is no room for a checkpoint. Earlier checkpoints are whole."""


class DivergenceError(ArithmeticError):
    """The loss, a gradient or a weight of a run is not finite. Earlier checkpoints are whole."""

    def __init__(self, folder: Path, what: str) -> None:
        last = get_last_checkpoint(str(folder))
        left = "no checkpoint was written before" if last is None else f"the last good checkpoint is {last}"
        super().__init__(
            f"The run diverged: {what}. Lower `optimizer.lr`, or raise `arguments.warmup_steps`, and give the recipe "
            f"another output; {left}."
        )


class Checkpoints(TrainerCallback):
    """Moves each complete checkpoint of `Trainer` to its place, and deletes old ones.

    A checkpoint is renamed before it is deleted, so a folder "checkpoint-N" is always whole.

    Args:
        folder: the folder of the checkpoints.
        keep: how many of the last ones to keep; all if None. The best one is always kept.
        finish: adds files to a checkpoint that `Trainer` does not write.
    """

    def __init__(self, folder: Path, keep: int | None, finish: Callable[[nn.Module, Path], None]) -> None:
        self.folder, self.keep, self.finish = folder, keep, finish

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the leftovers of a run that was killed."""
        if args.should_save:
            leftovers = [self.folder / DELETING, *Path(str(args.output_dir)).glob("checkpoint-*")]
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
        PartialState().wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete the checkpoint and move it to its place.

        Raises:
            DivergenceError: a number in it is not finite.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if bad := non_finite(model.state_dict()) or non_finite(_flat(optimizer.state)):
            raise DivergenceError(
                self.folder, f"after step {state.global_step} {bad} holds numbers that are not finite"
            )
        unfinished = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        finished = self.folder / unfinished.name
        if state.best_model_checkpoint == str(unfinished):
            state.best_model_checkpoint = str(finished)
        PartialState().wait_for_everyone()  # every process has written its part
        if args.should_save:
            state.save_to_json(str(unfinished / "trainer_state.json"))
            self.finish(model, unfinished)
            (unfinished / CHECKSUMS).write_text(json.dumps(_checksums(unfinished), indent=1), encoding="utf-8")
            if finished.exists():  # of a run that was resumed from an earlier step
                self._delete(finished)
            os.replace(unfinished, finished)
            whole = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            for old in whole[: -self.keep] if self.keep else []:
                if str(old) != state.best_model_checkpoint:
                    self._delete(old)
        PartialState().wait_for_everyone()

    def _delete(self, checkpoint: Path) -> None:
        leaving = self.folder / DELETING
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(checkpoint, leaving)
        shutil.rmtree(leaving)


def _checksums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(checkpoint: Path) -> TrainerState:
    """The state of the run in a checkpoint, after its files are compared with their checksums.

    Raises:
        CheckpointDamageError: a file is missing, changed or unreadable.
    """
    try:
        saved = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
        changed = [name for name, checksum in saved.items() if _sha256(checkpoint / name) != checksum]
        reason = f"{changed[0]} is not as it was written" if changed else ""
    except FileNotFoundError as error:
        reason = f"{Path(error.filename).name} is missing"
    except (ValueError, AttributeError):
        reason = f"{CHECKSUMS} is not as it was written"
    except OSError as error:
        raise CheckpointDamageError(f"{checkpoint} cannot be read ({error}); make it readable.") from error
    if reason:
        raise CheckpointDamageError(
            f"{checkpoint} is damaged ({reason}); remove this folder to continue from the one before it, or the whole run "
            "to start again."
        )
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def non_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor with NaN or infinity; None if there is none. Of a DTensor, the local shard counts."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, torch.Tensor) and local.is_floating_point():
            wide = local.float() if local.element_size() == 1 else local  # isfinite does not exist for all 8-bit types
            if not wide.isfinite().all():
                return name
    return None


def _flat(state: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"the optimizer's {key} ({i})": value for i, of in enumerate(state.values()) for key, value in of.items()}


@contextmanager
def room(folder: Path, least: int = 2**20) -> Iterator[None]:
    """Inside, a library writes files. Any error there becomes a `DiskFullError` if the disk is full.

    Libraries report a full disk in different ways, and some do not name the cause.

    Args:
        folder: where files are written.
        least: free bytes below which the disk counts as full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free >= least:
            raise
        raise DiskFullError(
            f"There is no room left for a checkpoint in {folder}; make some, and continue with --resume."
        ) from error


def save_whole(write: Callable[[Path], None], folder: Path) -> None:
    """Have `write` fill a temporary folder, then move its files into `folder` one by one, config.json last.

    Raises:
        DiskFullError: there is no room.
    """
    unfinished = folder.with_name(f"{folder.name}{SAVING}")  # beside `folder`, so that relative paths stay valid
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with room(unfinished):
        write(unfinished)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    unfinished.rmdir()
