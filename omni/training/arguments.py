"""The `arguments` of a recipe, which become transformers' `TrainingArguments`."""

import math
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

_AT_LEAST_ONE = {
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "save_total_limit",
}
_AT_MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1, "dataloader_num_workers": 1024}


def check_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments under the names of the installed transformers.

    Raises:
        ValueError: one is unknown, has a wrong type or a value outside of its range, or has no meaning for omni.
    """
    from transformers import TrainingArguments  # imported here because it takes seconds

    known = {field.name for field in fields(TrainingArguments) if field.init} - {"output_dir"}
    arguments = _installed_names(arguments, known)
    if unknown := sorted(set(arguments) - known):
        raise ValueError(f"TrainingArguments of transformers knows no {', '.join(map(repr, unknown))}")
    if (bf16 := arguments.get("bf16", False)) not in (True, False, "auto"):  # for Trainer any text is true
        raise ValueError(f'`bf16` is true, false or "auto", found {bf16!r}')
    types = get_type_hints(TrainingArguments)
    for name, value in arguments.items():  # transformers does not check types, and fails much later
        if name == "bf16" and value == "auto":
            continue
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ValueError(f"`{name}` cannot be {value!r}: {error.errors()[0]['msg']}") from error
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or (name, value) == ("max_steps", -1):
            continue
        if not math.isfinite(value):
            raise ValueError(f"`{name}` should be a finite number, found {value}")
        if value < (least := 1 if name in _AT_LEAST_ONE else 0):
            raise ValueError(f"`{name}` should be at least {least}, found {value}")
        if value > (most := _AT_MOST.get(name, 2**63 - 1)):
            raise ValueError(f"`{name}` should be at most {most}, found {value}")
    if arguments.get("num_train_epochs", 1) == 0:
        raise ValueError("`num_train_epochs` should be more than 0, found 0")
    if arguments.get("label_smoothing_factor"):
        raise ValueError("`label_smoothing_factor` has no meaning here, as each objective has its own loss; drop it")
    if arguments.get("save_only_model"):
        raise ValueError("`save_only_model` leaves out what a run is resumed from, so that it would begin anew")
    return arguments


def _installed_names(arguments: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Arguments for computing activations twice, under the name that the installed transformers has for them.

    It is "activation_checkpointing" in transformers 5.23 and newer, and "gradient_checkpointing" before.
    """
    new, old = "activation_checkpointing", "gradient_checkpointing"
    name, other = (new, old) if new in known else (old, new)
    if both := sorted(set(arguments) & {key.replace(other, name) for key in arguments if key.startswith(other)}):
        raise ValueError(f"{', '.join(map(repr, both))} is given twice, also as {other!r}; give it once")
    return {key.replace(other, name): value for key, value in arguments.items()}
