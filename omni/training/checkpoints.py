"""The checkpoints of a run: each is there as a whole or not at all, and is looked through before a run goes on from it.

run/trainer/checkpoint-8    what `Trainer` is writing
run/checkpoint-8            the same with `checksums.json`, moved here in one step when every number in it is finite
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
    """A checkpoint of a run that cannot be gone on from: files of it are lost, changed or unreadable."""


class DiskFullError(OSError):
    """No room for a checkpoint; those that were written before are whole."""


class DivergenceError(ArithmeticError):
    """A run whose loss, gradients or weights are no longer finite; the checkpoints that were written before are whole."""

    def __init__(self, folder: Path, what: str) -> None:
        last = get_last_checkpoint(str(folder))
        left = "no checkpoint was written before" if last is None else f"the last good checkpoint is {last}"
        super().__init__(
            f"The run diverged: {what}. Lower `optimizer.lr`, or raise `arguments.warmup_steps`, and give the recipe "
            f"another output; {left}."
        )


class Checkpoints(TrainerCallback):
    """Moves what `Trainer` has written to its place, if it is whole, and deletes what is too old.

    A checkpoint that is no longer needed is renamed before it is deleted, so a folder "checkpoint-N" is always whole.

    Args:
        folder: where checkpoints belong.
        keep: how many; all if None. The best one is kept beside them.
        finish: adds to a checkpoint what `Trainer` knows nothing of.
    """

    def __init__(self, folder: Path, keep: int | None, finish: Callable[[nn.Module, Path], None]) -> None:
        self.folder, self.keep, self.finish = folder, keep, finish

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove what a run that was killed has left."""
        if args.should_save:
            leftovers = [self.folder / DELETING, *Path(str(args.output_dir)).glob("checkpoint-*")]
            for leftover in leftovers:
                shutil.rmtree(leftover, ignore_errors=True)
        PartialState().wait_for_everyone()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Accept what was written.

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
            if finished.exists():  # an earlier run came to this step, and is taken up from an earlier one
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
    """How far a run had come, if every file of its checkpoint is as it was written.

    Raises:
        CheckpointDamageError: a file is not, or cannot be read.
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
            f"{checkpoint} is damaged ({reason}); remove this folder to go on from the one before it, or the whole run to "
            "begin anew."
        )
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def non_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that holds NaN or infinity; of a sharded one this process' shard is looked at."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if isinstance(local, torch.Tensor) and local.is_floating_point():
            wide = local.float() if local.element_size() == 1 else local  # torch does not ask it of all 8-bit types
            if not wide.isfinite().all():
                return name
    return None


def _flat(state: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"the optimizer's {key} ({i})": value for i, of in enumerate(state.values()) for key, value in of.items()}


@contextmanager
def room(folder: Path, least: int = 2**20) -> Iterator[None]:
    """Inside, something is written; libraries say in their own ways that the disk was full, and some do not say it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free >= least:
            raise
        raise DiskFullError(
            f"There is no room left for a checkpoint in {folder}; make some, and go on with --resume."
        ) from error


def save_whole(write: Callable[[Path], None], folder: Path) -> None:
    """Let `write` fill a folder, and only then put its files, one rename each, where they belong; config.json last."""
    unfinished = folder.with_name(f"{folder.name}{SAVING}")  # as deep, since paths to parts start there
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with room(unfinished):
        write(unfinished)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    unfinished.rmdir()
