"""Memory and time that a training step of a recipe needs on this machine, measured on a few steps."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils import send_to_device
from torch import nn

from omni.fusion import acceleration
from omni.training.objectives import make_objective
from omni.training.parts import CHECKPOINTING, FrozenParts
from omni.training.recipe import Recipe
from omni.training.run import prepare

ROWS = 4
"""Rows in a training step."""
SHARE = 0.6
"""Share of the free memory that a step may need. The rest is for longer rows and for other programs."""
STEPS = 3
"""Steps that are timed."""


@dataclass(frozen=True)
class Budget:
    """The measurements of a training step.

    Attributes:
        rows: rows in a batch.
        accumulate: batches in a step (gradient accumulation).
        checkpointing: whether activations must be recomputed (activation checkpointing).
        seconds: time of a step.
        learning: number of trainable parameters.
    """

    rows: int
    accumulate: int
    checkpointing: bool
    seconds: float
    learning: int


def measure(recipe: Recipe) -> Budget:
    """Run a few steps of a recipe and discard the result. If the recipe sets a batch size, that is used.

    Raises the errors of `omni.training.run.run` about models and data.
    """
    objective = make_objective(recipe)
    model: Any = prepare(objective.model, recipe)
    device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or torch.device("cpu")
    model.to(device).train()
    FrozenParts(model)
    examples = [objective.train[index] for index in range(min(ROWS, len(objective.train)))]
    largest = max(examples, key=lambda example: sum(map(len, map(str, example.conversations))))
    batch = send_to_device(objective.collate([largest]), device)
    kept = _kept(model, batch)
    free = SHARE * free_memory(device) - _bytes(model)  # saving compares the weights with those on disk
    given = recipe.arguments.get("per_device_train_batch_size")
    checkpointing = bool(recipe.arguments.get(CHECKPOINTING))
    if free < kept * (given or ROWS):
        text = model.config.text_config
        outputs = text.num_hidden_layers * batch["input_ids"].numel() * text.hidden_size * model.dtype.itemsize
        kept, checkpointing = outputs + 2 * kept // text.num_hidden_layers, True
    rows = given or _power_of_two(max(1, min(ROWS, int(free // kept))))
    accumulate = recipe.arguments.get("gradient_accumulation_steps") or max(1, ROWS // rows)
    times = []
    with acceleration.current().training(model, device, torch.float32):
        for _ in range(STEPS + 1):
            batch = send_to_device(objective.collate(examples[:rows]), device)
            start = time.perf_counter()
            model(**batch).loss.backward()
            times.append(time.perf_counter() - start)
    seconds = median(times[1:]) * max(1, rows / ROWS) * accumulate * (1.3 if checkpointing else 1.0)
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Budget(rows, accumulate, checkpointing, seconds, learning)


def _kept(model: nn.Module, batch: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass, without the weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**batch)  # kept alive, so that no address is used twice
    assert output.loss is not None
    return sum(found.values())


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Free memory in bytes: of the accelerator, or else of this machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        most, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such files on this system, or no limit ("max")
        return free
    return min(free, max(0, most - used))
