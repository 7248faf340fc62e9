"""Runs a recipe with `transformers.Trainer`, and so under accelerate, torchrun, DDP or FSDP without a line of ours."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from transformers import TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from omni.checkpoints.fingerprints import part_of
from omni.embedding.engine import bfloat16_pays
from omni.registry import get_modality
from omni.training.curves import draw_curves
from omni.training.objectives import make_objective
from omni.training.optimizer import freeze, make_optimizer
from omni.training.recipe import Lora, Recipe, RecipeError
from omni.training.trainer import (
    OmniTrainer,
    expect_inputs,
    gather,
    read_state,
    rest_frozen_parts,
    save_whole,
    write_whole,
)

T = TypeVar("T")


def run(recipe: Recipe, resume: bool = False) -> Path:
    """Train what the recipe describes and return the folder of the finished checkpoint.

    Args:
        recipe: see `Recipe`.
        resume: go on from the last checkpoint of an earlier run of this recipe, if there is one.

    Raises:
        FileExistsError: the output folder holds a finished checkpoint, or a run and `resume` is not set.
        RecipeError: a run to be resumed was of another recipe or of other data, a pattern matches nothing, a model cannot be
            made, or transformers does not take the arguments.
        CheckpointDamageError: a run to be resumed has lost files or parts of them.
        DiskFullError: there is no room for a checkpoint.
        ManifestError, PictureError: data that cannot be read.
        ExampleError: data that cannot be learnt from.
    """
    output = Path(recipe.output)
    state, last = output / "run", last_checkpoint(recipe)
    if last and not resume:
        raise FileExistsError(f"{state} holds an earlier run up to {last.name}; resume it, or remove the folder.")
    if not last and any((output / name).exists() for name in ("config.json", "adapter_config.json")):
        raise FileExistsError(
            f"{output} holds a finished checkpoint already; name another output, or remove the folder."
        )
    recipe = settle(recipe, _read_recipe(state) if last else None)
    with _transformers_takes_the_arguments():
        arguments = TrainingArguments(output_dir=str(state), **_arguments(recipe))
    set_seed(arguments.seed)
    objective = make_objective(recipe)
    data = {"train": _rows_digest(objective.train), "evaluate": _rows_digest(objective.evaluate)}
    if last:
        _expect_same_data(data, state)
    model = prepare(objective.model, recipe)
    with _transformers_takes_the_arguments():
        state.mkdir(parents=True, exist_ok=True)
        trainer = OmniTrainer(
            model=model,
            args=arguments,
            train_dataset=objective.train,
            eval_dataset=objective.evaluate,
            data_collator=objective.collate,
            compute_metrics=objective.metrics,
            preprocess_logits_for_metrics=objective.reduce_logits,
            processing_class=objective.processor,
            make_optimizer=partial(make_optimizer, settings=recipe.optimizer, bf16=bool(recipe.arguments.get("bf16"))),
        )
        trainer.get_train_dataloader()
    _check_fsdp(trainer, recipe)
    if not trainer.is_fsdp_enabled:
        trainer.create_optimizer()  # now: what a recipe says wrongly shall not be said after something was written
    if trainer.is_world_process_zero():
        write_whole(state / "recipe.json", recipe.model_dump_json(indent=2))
        write_whole(state / "data.json", json.dumps(data, indent=2))
    earlier = read_state(last) if last else TrainerState()
    if last and earlier.global_step >= earlier.max_steps:  # `train` would go on until the end of the epoch
        trainer._load_from_checkpoint(str(last))
        trainer.state = earlier
    else:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_fsdp_enabled:
        gather(trainer.accelerator.unwrap_model(trainer.model), keep=trainer.is_world_process_zero())
    if trainer.is_world_process_zero():
        finished = trainer.accelerator.unwrap_model(trainer.model)
        save_whole(lambda folder: objective.save(finished, folder), output)
        history = trainer.state.log_history
        write_whole(state / "history.json", json.dumps(history, indent=1))
        draw_curves(history, state / "curves.png")
    if trainer.accelerator.num_processes > 1:  # who leaves early would pull its connections from under the others
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return output


def last_checkpoint(recipe: Recipe) -> Path | None:
    """Of the run in the output folder of this recipe, from which it can be resumed; None if there is none."""
    state = Path(recipe.output) / "run"
    last = get_last_checkpoint(str(state)) if state.is_dir() else None
    return Path(last) if last else None


@contextmanager
def _transformers_takes_the_arguments() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise RecipeError(f"Correct `arguments` or `output` of the recipe, which cannot be used: {error}") from error


def _rows_digest(examples: Any) -> str | None:
    """Of a user's own data; of pictures that are drawn the recipe says all that there is to know."""
    manifest = getattr(examples, "manifest", None)
    return manifest.rows_digest() if manifest else None


def _expect_same_data(data: dict[str, str | None], state: Path) -> None:
    """The rest of a run on other rows would be of neither data set; pictures are not looked at."""
    before = _read(state / "data.json", json.loads)
    if changed := sorted(name for name, digest in data.items() if digest != before.get(name)):
        raise RecipeError(
            f"The rows of {' and '.join(changed)} are not those that the run in {state} began with; bring them back, or "
            "give this recipe another output."
        )


def _check_fsdp(trainer: OmniTrainer, recipe: Recipe) -> None:
    if not trainer.is_fsdp_enabled:
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):  # accelerate says nothing
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
    """Freeze what the recipe freezes, or put its adapters in."""
    if recipe.lora:
        model = add_adapters(model, recipe.lora)
    freeze(model, recipe.freeze)
    if recipe.caches and any(p.requires_grad for name, p in model.named_parameters() if "image_tower" in name):
        raise RecipeError(
            '`cache` keeps what the encoder says of a picture, so the encoder may not learn; add "image_tower" to `freeze`, '
            "or drop `cache`."
        )
    rest_frozen_parts(model)
    config: Any = getattr(model, "config", None)
    if untrained := getattr(config, "untrained", None):  # what learns from now on is no longer at random
        learning = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        config.untrained = [part for part in untrained if part not in learning]
    return model


def add_adapters(model: nn.Module, settings: Lora) -> nn.Module:
    """The model with low-rank adapters of peft, which alone are trained."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("`lora` in a recipe needs peft: pip install 'omni-thinker[train]'.") from error
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=settings.modules_to_save or None,
        # else an embedding that is trained would leave the head, which is the same tensor, where it was
        ensure_weight_tying=bool(getattr(model.config, "tie_word_embeddings", False)),
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # a pattern that matches no module
        raise RecipeError(f"`lora` of the recipe does not fit the model: {error}") from error


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `Trainer`: on an accelerator if there is one; without data for it there is no evaluation."""
    arguments = {"use_cpu": not torch.accelerator.is_available(), **recipe.arguments}
    return arguments if recipe.evaluate else {**arguments, "eval_strategy": "no"}


def _read_recipe(state: Path) -> Recipe:
    return _read(state / "recipe.json", lambda text: Recipe.model_validate_json(text))


def _read(path: Path, parse: Callable[[str], T]) -> T:
    """A file that a run has left, which it cannot be resumed without."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"Without a whole {path} nobody knows what the run was of, so it is not resumed ({error}); bring the file back, "
            "or give this recipe another output."
        ) from error


def settle(recipe: Recipe, earlier: Recipe | None = None) -> Recipe:
    """The recipe with a decision where it says "auto": that of the run to be resumed, else what is fast on this device.

    Raises:
        RecipeError: the run to be resumed was of other settings; its result would be of neither recipe.
    """
    if recipe.arguments.get("bf16") == "auto":
        bf16 = earlier.arguments.get("bf16") if earlier else _bfloat16_is_fast(recipe.arguments)
        recipe = recipe.model_copy(update={"arguments": {**recipe.arguments, "bf16": bf16}})
    if earlier:
        before = earlier.model_dump(exclude={"about"})
        changed = sorted(key for key, value in recipe.model_dump(exclude={"about"}).items() if value != before[key])
        if changed:
            state = Path(recipe.output) / "run"
            raise RecipeError(
                f"The run in {state} began with other settings of {', '.join(changed)}; resume it with the recipe in "
                f"{state / 'recipe.json'}, or give this one another output."
            )
    return recipe


def _bfloat16_is_fast(arguments: dict[str, Any]) -> bool:
    if torch.accelerator.is_available() and not arguments.get("use_cpu"):
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bfloat16_pays()
