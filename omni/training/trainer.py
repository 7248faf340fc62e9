"""transformers' `Trainer` for long runs: it stops when a run diverges, and draws progress bars on terminals only."""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import has_length

from omni.checkpoints.fingerprints import part_of, read_tensors
from omni.data.conversations import ExampleError
from omni.fusion.parts import elsewhere
from omni.training.checkpoints import CheckpointDamageError, DivergenceError, non_finite, room
from omni.training.order import Order


class OmniTrainer(Trainer):
    """A `Trainer` that continues from whole checkpoints only, and stops when a number is not finite.

    Args:
        folder: the folder of the run, with its checkpoints.
        make_optimizer: builds the optimizer of a model.
        watch: reports progress instead of the logs.
    """

    def __init__(
        self,
        *args: Any,
        folder: Path,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        watch: TrainerCallback | None = None,
        **kwargs: Any,
    ) -> None:
        self.order: Order | None = None
        super().__init__(*args, **kwargs)
        self._folder, self._make_optimizer = folder, make_optimizer
        self.add_callback(_Epochs(self))
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress() if watch is None else Bars())
        if watch is not None:
            self.pop_callback(PrinterCallback)
            self.add_callback(watch)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the run. Under FSDP `Trainer` passes the sharded model."""
        self.optimizer: torch.optim.Optimizer | None
        if self.optimizer is None:
            self.optimizer = self._make_optimizer(self.model if model is None else model)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and close the progress bar, so that any message after it begins on a new line.

        Raises:
            CheckpointDamageError: the weights to continue from do not fit or are not finite.
            DivergenceError: a loss, a gradient or a weight is not finite.
            DiskFullError: there is no room for a checkpoint.
        """
        try:
            with room(self._folder):
                return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                    callback.training_bar.close()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Examples in random order, grouped by length if the data set has `lengths`.

        Rows that are read together stay near each other, and sources mix by weight, see `Order`.
        """
        if Order.wanted(self.train_dataset):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            lanes = self.args.world_size * max(self.args.dataloader_num_workers, 1)
            self.order = Order(self.train_dataset, self.args.train_batch_size, lanes, seed)
            return self.order
        lengths = getattr(self.train_dataset, "lengths", None)
        if lengths is None:
            return super()._get_train_sampler(train_dataset)
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=lengths())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a batch. Returns the loss, a scalar.

        Raises:
            DivergenceError: the loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite().all():
            raise DivergenceError(self._folder, f"at step {self.state.global_step + 1} the loss is {loss.item()}")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log.

        Raises:
            DivergenceError: the norm of the gradients is not finite, and float16 has not skipped the step for it.
        """
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(norm) and not self.accelerator.optimizer_step_was_skipped:
            raise DivergenceError(self._folder, f"at step {self.state.global_step} the norm of the gradients is {norm}")
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights of a run. `Trainer` itself ignores missing ones, and warns about tied ones."""
        if self.is_fsdp_enabled or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_weights(self.model, Path(resume_from_checkpoint))
        if name := non_finite(self.model.state_dict()):
            raise CheckpointDamageError(
                f"The run cannot continue from {resume_from_checkpoint}: {name} holds numbers that are not finite; remove "
                "this folder to continue from the one before it, or the whole run to start again."
            )


def _load_weights(model: nn.Module, folder: Path) -> None:
    """Load all weights of a model. A tied weight is saved under one of its names."""
    result = model.load_state_dict(read_tensors(folder), strict=False)
    apart = elsewhere(getattr(model, "config", None))
    names = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    loaded = {key for name, key in names.items() if name not in result.missing_keys}
    missing = [name for name in result.missing_keys if names.get(name) not in loaded and part_of(name) not in apart]
    if wrong := [*missing, *result.unexpected_keys]:
        raise CheckpointDamageError(
            f"{folder} has other tensors than the model; missing or unexpected: {', '.join(wrong[:5])}. It was written by "
            "another version; give the recipe another output."
        )


class _Epochs(TrainerCallback):
    """Tells `Order` which epoch begins. accelerate does not do so after a run is resumed in several processes."""

    def __init__(self, trainer: OmniTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before its first example is drawn."""
        if self.trainer.order is not None:
            self.trainer.order.epoch = int(state.epoch or 0)


class Progress(ProgressCallback):
    """transformers' progress bars, on terminals only. After a resume, the rate counts the new steps only."""

    prediction_bar: Any

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar at the step that a resumed run has reached."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=None)
        self.current_step = state.global_step

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Draw the bar of an evaluation."""
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            leave = self.training_bar is None
            self.prediction_bar = tqdm(total=len(eval_dataloader), leave=leave, dynamic_ncols=True, disable=None)
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)


class Bars(Progress):
    """Progress bars without the lines of logs."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


def expect_inputs(model: nn.Module, names: Collection[str]) -> None:
    """Refuse batches that lack one of these inputs: a process that skips a sharded part would block all others.

    Raises:
        ExampleError: in the model's forward, for such a batch.
    """

    def check(_: nn.Module, args: Any, given: dict[str, Any]) -> None:
        if lacking := sorted(name for name in names if given.get(name) is None):
            raise ExampleError(
                f"Under FSDP every batch of every process needs all inputs, found one without {', '.join(lacking)}; leave "
                "rows without such items out of the data, or train whole models (without --use_fsdp)."
            )

    model.register_forward_pre_hook(check, with_kwargs=True)


def gather(model: nn.Module, keep: bool) -> None:
    """Gather whole parameters from the shards of FSDP, in the processes where `keep` is true.

    All processes must call this. Shared parameters stay shared.
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
