"""transformers' `Trainer`, with what a run of hours needs: whole checkpoints, frozen parts at rest, sharded models."""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, Trainer, TrainerState

from omni.data.conversations import ExampleError

SAVING, DELETING = ".saving", ".deleting"


class CheckpointDamageError(RuntimeError):
    """A checkpoint of a run that has lost files, or parts of them."""


class DiskFullError(OSError):
    """No room for a checkpoint; those that were written before are whole."""


class OmniTrainer(Trainer):
    """A `Trainer` that may be killed at any moment.

    A checkpoint is written in a folder that resuming does not look at, and then renamed in one step; one that is no
    longer needed is renamed before it is deleted. So a folder "checkpoint-N" is always whole.
    """

    def __init__(self, *args: Any, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._make_optimizer = make_optimizer
        if self.is_world_process_zero():
            for leftover in (SAVING, DELETING):
                shutil.rmtree(Path(self.args.output_dir, leftover), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the run; under FSDP that of the pieces that a process holds, once they are its own."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            self.optimizer = self._make_optimizer(self.model if model is None else model)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what is said afterwards, also about a mistake, begins on a line of its own."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()

    # `Trainer` passes over what a checkpoint lacks, and would go on with a new optimizer, schedule and random numbers.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _whole(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _whole(checkpoint, "optimizer*", "scheduler.pt"):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with _whole(checkpoint, "rng_state*.pth"):
                super()._load_rng_state(checkpoint)
            processes = len(list(Path(checkpoint).glob("rng_state*.pth")))
            if processes != self.args.world_size and self.is_world_process_zero():
                warnings.warn(
                    f"The run had {processes} processes and has {self.args.world_size} now, so its batches are other ones.",
                    stacklevel=2,
                )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.args.output_dir
        name = f"checkpoint-{self.state.global_step}"
        unfinished, finished = Path(folder, SAVING, name), Path(folder, name)
        self.args.output_dir = str(Path(folder, SAVING))
        try:
            with _room(Path(folder)):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = folder
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(finished)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / "trainer_state.json"))
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            if finished.exists():  # an earlier run came to this step, and is taken up from an earlier one
                self._delete(finished)
            os.replace(unfinished, finished)
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            self._rotate(Path(folder))
        self.accelerator.wait_for_everyone()

    def _rotate(self, folder: Path) -> None:
        limit = self.args.save_total_limit
        whole = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        for old in whole[:-limit] if limit else []:
            if str(old) != self.state.best_model_checkpoint:
                self._delete(old)

    def _delete(self, checkpoint: Path) -> None:
        leaving = checkpoint.parent / DELETING
        shutil.rmtree(leaving, ignore_errors=True)
        os.replace(checkpoint, leaving)
        shutil.rmtree(leaving)


def read_state(checkpoint: Path) -> TrainerState:
    """How far the run had come."""
    with _whole(checkpoint):
        return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


@contextmanager
def _whole(checkpoint: str | Path, *needed: str) -> Iterator[None]:
    """Inside, a checkpoint is read; it has to have files of these patterns."""
    try:
        for pattern in needed:
            if not any(Path(checkpoint).glob(pattern)):
                raise FileNotFoundError(f"{pattern} is missing")
        yield
    except (torch.OutOfMemoryError, PermissionError):
        raise  # the checkpoint is whole, and to be told to remove it would be a loss
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointDamageError(
            f"{checkpoint} is damaged ({reason}); remove this folder to go on from the one before it, or the whole run to "
            "begin anew."
        ) from error


@contextmanager
def _room(folder: Path, least: int = 2**20) -> Iterator[None]:
    """Inside, something is written; libraries say in their own ways that the disk was full, and some do not say it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(folder).free >= least:
            raise
        raise DiskFullError(
            f"There is no room left for a checkpoint in {folder}; make some, and go on with --resume."
        ) from error


def rest_frozen_parts(model: nn.Module) -> None:
    """Keep parts without a trainable parameter in eval mode: dropout in them would be noise that nothing learns from.

    `Trainer` sets the whole model to training mode before each step, so this is done before each forward.
    """
    frozen = list(_frozen_parts(model))
    if frozen:

        def rest(*_: Any) -> None:
            for part in frozen:
                part.eval()

        model.register_forward_pre_hook(rest)


def _frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    trainable = [p.requires_grad for p in module.parameters()]
    if trainable and not any(trainable):
        yield module
    else:
        for child in module.children():
            yield from _frozen_parts(child)


def expect_inputs(model: nn.Module, names: Collection[str]) -> None:
    """Refuse batches that lack one of these: who has nothing for a sharded part would leave the others waiting for it."""

    def check(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if lacking := sorted(name for name in names if given.get(name) is None):
            raise ExampleError(
                f"Under FSDP every batch of every process needs all inputs, found one without {', '.join(lacking)}; leave "
                "rows without pictures out of the data, or train whole models (without --use_fsdp)."
            )

    model.register_forward_pre_hook(check, with_kwargs=True)


def gather(model: nn.Module, keep: bool) -> None:
    """Make whole parameters of the pieces that FSDP has put into several processes, in those that `keep` them.

    All processes have to take part. Shared parameters stay shared.
    """
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                tensor = parameter.full_tensor().detach()
                whole[id(parameter)] = nn.Parameter(tensor.cpu(), parameter.requires_grad) if keep else parameter
            if keep:
                module._parameters[name] = whole[id(parameter)]


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that whoever is killed meanwhile leaves the old one or the new one, never a half."""
    unfinished = path.with_name(path.name + SAVING)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def save_whole(write: Callable[[Path], None], folder: Path) -> None:
    """Let `write` fill a folder, and only then put its files, one rename each, where they belong; config.json last."""
    unfinished = folder / SAVING
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with _room(unfinished):
        write(unfinished)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)
    unfinished.rmdir()
