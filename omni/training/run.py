"""Runs a recipe with `transformers.Trainer`, which also brings accelerate, torchrun, DDP and FSDP."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments, get_scheduler, set_seed
from transformers.trainer_utils import get_last_checkpoint

from omni.checkpoints.fingerprints import part_of
from omni.embedding.engine import bfloat16_pays
from omni.familiarise import ROWS, familiarise
from omni.files import write_text_whole
from omni.fusion import acceleration
from omni.registry import get_modality
from omni.training.adapters import add_adapters, note_base
from omni.training.checkpoints import Checkpoints, DivergenceError, non_finite, read_state, room, save_whole
from omni.training.curves import draw_curves
from omni.training.objectives import Objective, make_objective
from omni.training.optimizer import make_optimizer
from omni.training.order import Mixed
from omni.training.parts import FrozenParts, Learning, freeze, learn_in_float32, resting_towers
from omni.training.recipe import Recipe, RecipeError
from omni.training.sections import TALKS
from omni.training.trainer import OmniTrainer, expect_inputs, gather

T = TypeVar("T")

OF_A_MODEL = (".json", ".safetensors", ".jinja", ".model", ".txt")
"""Suffixes of the files of a checkpoint on which a run that starts from it depends."""


def run(recipe: Recipe, resume: bool = False, watch: TrainerCallback | None = None) -> Path:
    """Train what the recipe describes and return the folder of the finished checkpoint.

    Args:
        recipe: see `Recipe`.
        resume: continue from the last checkpoint of an earlier run of this recipe, if there is one.
        watch: reports progress instead of `Trainer`.

    Raises:
        FileExistsError: the output folder holds a finished checkpoint, or a run and `resume` is not set.
        RecipeError: the run to resume had another recipe, other data or another initial model; a pattern matches
            nothing; the model cannot be built; or transformers refuses the arguments.
        CheckpointDamageError: the checkpoint to resume from is damaged.
        DivergenceError: a loss, a gradient or a weight is not finite.
        DiskFullError: there is no room for a checkpoint.
        ManifestError, ItemError: data cannot be read.
        ExampleError: data cannot be learnt from.
    """
    output = Path(recipe.output)
    folder, last = output / "run", last_checkpoint(recipe)
    _expect_free(output, last, resume)
    recipe = settle(recipe, _read_recipe(folder) if last else None)
    written = recipe.model_dump_json(indent=2)
    recipe = recipe.model_copy(deep=True)  # libraries may change the parts that they are given
    with _transformers_takes_the_arguments():
        settings = {**_arguments(recipe), "save_total_limit": None}  # `Checkpoints` deletes them
        arguments = TrainingArguments(output_dir=str(folder / "trainer"), **settings)
        _try_schedule(arguments)
    set_seed(arguments.seed)
    objective = make_objective(recipe)
    data: dict[str, str | None] = {"model": _model_digest(recipe.model)}
    data |= {"train": _rows_digest(objective.train), "evaluate": _rows_digest(objective.evaluate)}
    earlier = _state_of(last, data, arguments) if last else TrainerState()
    model = prepare(objective.model, recipe)
    if name := non_finite(model.state_dict()):
        raise RecipeError(f"`model` of the recipe cannot be used: {name} holds numbers that are not finite.")
    learning = Learning(**earlier.stateful_callbacks.get("Learning", {}).get("args", {}))
    keep = recipe.arguments.get("save_total_limit")
    with _transformers_takes_the_arguments():
        folder.mkdir(parents=True, exist_ok=True)
        trainer = OmniTrainer(
            model=model,
            args=arguments,
            train_dataset=objective.train,
            eval_dataset=objective.evaluate,
            data_collator=objective.collate,
            compute_metrics=objective.metrics,
            preprocess_logits_for_metrics=objective.reduce_logits,
            processing_class=objective.processor,
            callbacks=[FrozenParts(model), learning, Checkpoints(folder, keep, note_base)],
            folder=folder,
            watch=watch,
            make_optimizer=partial(make_optimizer, settings=recipe.optimizer, bf16=bool(recipe.arguments.get("bf16"))),
        )
        trainer.get_train_dataloader()
    _check_fsdp(trainer, recipe)
    if not trainer.is_fsdp_enabled:
        trainer.create_optimizer()  # now, so that an error in the recipe is raised before anything is written
    if trainer.is_world_process_zero():
        _write(folder / "recipe.json", written)
        _write(folder / "data.json", json.dumps(data, indent=2))
    if last and earlier.global_step >= earlier.max_steps:  # `train` would continue to the end of the epoch
        trainer._load_from_checkpoint(str(last))
        trainer.state = earlier
        learning.apply(model)
    else:
        precision = torch.bfloat16 if arguments.bf16 else torch.float32
        with acceleration.current().training(model, arguments.device, precision):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_fsdp_enabled:
        gather(trainer.accelerator.unwrap_model(trainer.model), keep=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        _finish(trainer, objective, recipe)
    if trainer.accelerator.num_processes > 1:  # a process that exits early closes connections that others still use
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return output


def last_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint from which the run in this recipe's output folder can be resumed; None if there is none."""
    folder = Path(recipe.output) / "run"
    last = get_last_checkpoint(str(folder)) if os.path.isdir(folder) else None
    return Path(last) if last else None


def _expect_free(output: Path, last: Path | None, resume: bool) -> None:
    """Refuse an output folder that holds a finished checkpoint, or a run that is not to be resumed."""
    if last and not resume:
        raise FileExistsError(f"{last.parent} holds an earlier run up to {last.name}; resume it, or remove the folder.")
    if not last and any(os.path.exists(output / name) for name in ("config.json", "adapter_config.json")):
        raise FileExistsError(
            f"{output} holds a finished checkpoint already; name another output, or remove the folder."
        )


def _finish(trainer: OmniTrainer, objective: Objective, recipe: Recipe) -> None:
    """Write the finished checkpoint, what its training inputs looked like, and the curves of the run."""
    output = Path(recipe.output)
    folder, arguments = output / "run", trainer.args
    finished = trainer.accelerator.unwrap_model(trainer.model)
    if name := non_finite(finished.state_dict()):
        raise DivergenceError(folder, f"{name} holds numbers that are not finite")
    save_whole(lambda unfinished: objective.save(finished, unfinished), output)
    if recipe.objective == "answers" and not finished.config.untrained:
        seen = trainer.state.global_step * trainer.get_total_train_batch_size(arguments)
        familiarise(output, objective.train, objective.evaluate, min(seen, ROWS), arguments.device)
    history = trainer.state.log_history
    _write(folder / "history.json", json.dumps(history, indent=1))
    draw_curves(history, folder / "curves.png")


@contextmanager
def _transformers_takes_the_arguments() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise RecipeError(f"Correct `arguments` or `output` of the recipe, which cannot be used: {error}") from error


def _try_schedule(arguments: TrainingArguments) -> None:
    """Build a schedule of learning rates, to find errors early: `Trainer` builds its own last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    name, settings = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=1, scheduler_specific_kwargs=settings)


def _write(path: Path, text: str) -> None:
    with room(path.parent):
        write_text_whole(path, text)


def _rows_digest(examples: Any) -> str | None:
    """A hash of the rows of the user's data; None for a world, which the recipe describes completely."""
    if isinstance(examples, Mixed):
        return " ".join(str(_rows_digest(part)) for part in examples.parts)
    manifest = getattr(examples, "manifest", None)
    return None if manifest is None else manifest.rows_digest()


def _model_digest(section: Any) -> str:
    """A hash of the files from which the recipe builds its model."""
    folders = [getattr(section, "checkpoint", None), getattr(section, "encoder", None)]
    folders += [each.get("encoder") for each in getattr(section, "sections", {}).values()]
    files = [
        path
        for folder in folders
        if folder is not None
        for path in sorted(Path(folder).iterdir())
        if path.suffix in OF_A_MODEL and path.is_file()
    ]
    if thinker := getattr(section, "thinker", None):
        files.append(Path(thinker))
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _state_of(last: Path, data: dict[str, str | None], arguments: TrainingArguments) -> TrainerState:
    """The state of the run to resume from this checkpoint. Other data than before are refused."""
    _expect_same_data(data, last.parent)
    state = read_state(last)
    _note_processes(last, arguments)
    return state


def _expect_same_data(data: dict[str, str | None], folder: Path) -> None:
    """Refuse to resume on other rows or from another model. The files of items are not compared."""
    before = _read(folder / "data.json", json.loads)
    if changed := sorted(name for name, digest in data.items() if digest != before.get(name)):
        names = " and ".join(f"`{name}`" for name in changed)
        raise RecipeError(
            f"The files of {names} in the recipe have changed since the run in {folder} began; restore them, or give this "
            "recipe another output."
        )


def _note_processes(last: Path, arguments: TrainingArguments) -> None:
    processes = len(list(last.glob("rng_state*.pth")))
    if processes != arguments.world_size and arguments.process_index == 0:
        warnings.warn(
            f"The run had {processes} processes and has {arguments.world_size} now, so its batches differ.",
            stacklevel=3,
        )


def _check_fsdp(trainer: OmniTrainer, recipe: Recipe) -> None:
    if not trainer.is_fsdp_enabled:
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):  # accelerate ignores it without a word
            raise RecipeError(
                "accelerate does not shard models on this device, but would train whole ones: drop --use_fsdp."
            )
        return
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise RecipeError("Only the second version of FSDP keeps parameters under their names: set --fsdp_version 2.")
    modalities = getattr(trainer.model.config, "modalities", {})
    expect_inputs(trainer.model, [name for modality in modalities for name in get_modality(modality).inputs])
    if recipe.optimizer.name == "muon":
        raise RecipeError("Under FSDP a process holds pieces of matrices, but Muon needs them whole: choose adamw.")


def prepare(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Freeze the parameters that the recipe freezes, or add its adapters.

    Raises:
        RecipeError: a pattern matches nothing, or the tower of a cached modality is trained.
    """
    towers = [f"{name}_tower" for name in getattr(model.config, "modalities", ())] if recipe.caches else []
    cached = [f"{name}_tower" for name in resting_towers(model, recipe)]
    if recipe.lora:
        model = add_adapters(model, recipe.lora)
    freeze(model, recipe.freeze)
    learning = {
        part_of(name.removeprefix("base_model.model.")) for name, p in model.named_parameters() if p.requires_grad
    }
    if recipe.caches and (not cached or learning & {*cached}):
        names = " or ".join(f'"{tower}"' for tower in towers)
        raise RecipeError(
            f"`cache` keeps the tokens of an encoder, so the encoder may not be trained; add {names} to `freeze`, or drop "
            "`cache`."
        )
    learn_in_float32(model)
    return model


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `Trainer`. It uses an accelerator if there is one, and evaluates if there are data for it."""
    arguments = {"use_cpu": not torch.accelerator.is_available(), **recipe.arguments}
    if recipe.objective in TALKS:  # a process may have no items of a modality in a batch
        arguments.setdefault("ddp_find_unused_parameters", True)
    return arguments if recipe.evaluate else {**arguments, "eval_strategy": "no"}


def _read_recipe(folder: Path) -> Recipe:
    return _read(folder / "recipe.json", lambda text: Recipe.model_validate_json(text))


def _read(path: Path, parse: Callable[[str], T]) -> T:
    """Parse a file of the run that is needed to resume it."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"The run cannot be resumed without a whole {path} ({error}); bring the file back, or give this recipe another "
            "output."
        ) from error


def settle(recipe: Recipe, earlier: Recipe | None = None) -> Recipe:
    """Replace "auto" in a recipe by the value of the run to resume, or else by what is faster on this device.

    Raises:
        RecipeError: the run to resume has other settings.
    """
    if recipe.arguments.get("bf16") == "auto":
        bf16 = earlier.arguments.get("bf16") if earlier else _bfloat16_is_fast(recipe.arguments)
        recipe = recipe.model_copy(update={"arguments": {**recipe.arguments, "bf16": bf16}})
    if earlier:
        before = earlier.model_dump(exclude={"about"})
        changed = sorted(key for key, value in recipe.model_dump(exclude={"about"}).items() if value != before[key])
        if changed:
            folder = Path(recipe.output) / "run"
            raise RecipeError(
                f"The run in {folder} began with other settings of {', '.join(changed)}; resume it with the recipe in "
                f"{folder / 'recipe.json'}, or give this one another output."
            )
    return recipe


def _bfloat16_is_fast(arguments: dict[str, Any]) -> bool:
    if torch.accelerator.is_available() and not arguments.get("use_cpu"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16_pays()
