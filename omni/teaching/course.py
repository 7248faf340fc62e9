"""Teach: from a lesson to a checkpoint with a card. A lesson that was cut off goes on where it was."""

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni.embedding.engine import bfloat16_pays
from omni.evaluation import Outcome, choose_settings, evaluate, update_card
from omni.evaluation.result import Asking
from omni.files import write_text_whole
from omni.fusion.processing_omni import OmniProcessor
from omni.training.recipe import Files, Recipe, RecipeError
from omni.training.run import last_checkpoint, run

from .budget import Budget, measure
from .card import write_card
from .lesson import START, TEXT_SHARE, Lesson, data_of, join, layers_for_lora, stored_in_half, world_of
from .watch import Watch, duration

LESSON, RECIPE, RESULT, CARD = "lesson.json", "recipe.json", "evaluation.json", "README.md"

SAMPLES = 12_000
"""So many pictures of a world are learnt from, unless there is a time."""
EPOCHS, FEWEST = 3, 2_000
"""So often the rows of one's own data are learnt from; few rows more often, until there were `FEWEST`."""
SAVE_EVERY = 300
"""Seconds between two checkpoints of the run."""
RATE, FASTER = 4e-4, {r"_projector\.(.*\.)?(bias|positions\.weight)$": 25.0, "lora_": 2.5}
"""The learning rate of AdamW, and what learns faster: biases and positions are a prompt that is learnt first."""


def teach(
    lesson: Lesson,
    output: str | Path,
    resume: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Outcome:
    """Compose, train, evaluate, and write a card.

    Args:
        lesson: what shall be learnt.
        output: a new folder, or with `resume` that of the same lesson.
        resume: go on with a lesson that was cut off.
        say: is told how it goes.
        progress: see `omni.evaluation.evaluate`.

    Returns:
        The evaluation at the end.

    Raises:
        FileExistsError: the folder holds something, and `resume` is not set.
        RecipeError: the folder is of another lesson; and the errors of a run (`omni.training.run.run`).
        CheckpointError: a part cannot be used.
        WorldError, ManifestError, ItemError, ExampleError, EvaluationError: data that cannot be used.
    """
    folder = Path(output)
    _begin(lesson, folder, resume)
    if not (folder / RECIPE).is_file():
        try:
            plan(lesson, folder, say)
        except ValueError:  # what was asked for cannot be; nothing of it is worth to be gone on with
            shutil.rmtree(folder)
            raise
    recipe = Recipe.read(folder / RECIPE)
    settings = _settings(lesson, recipe, folder)
    if not _finished(folder):
        processor = OmniProcessor.from_pretrained(folder / START)
        rows = recipe.arguments["per_device_train_batch_size"]
        run(recipe, last_checkpoint(recipe) is not None, Watch(settings.questionnaire(), processor, say, rows))
    outcome = evaluate(folder, settings, progress)
    outcome.result.write(folder / RESULT)
    write_card(folder / CARD, lesson, recipe, folder)
    update_card(folder / CARD, outcome.result)
    return outcome


def _begin(lesson: Lesson, folder: Path, resume: bool) -> None:
    """Expect a new folder, or one of the same lesson; and note the lesson there."""
    there = folder / LESSON
    if there.is_file():
        if not resume:
            raise FileExistsError(
                f"{str(folder)!r} holds a lesson already; go on with --resume, or name another output."
            )
        before = json.loads(there.read_text(encoding="utf-8"))
        now = lesson.model_dump()
        if changed := sorted(key for key in now if now[key] != before.get(key)):
            raise RecipeError(
                f"The lesson in {str(folder)!r} began with another {', '.join(changed)}; give the same as then, which "
                f"{str(there)!r} has, or name another output."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"Expected a new folder, but {str(folder)!r} exists already; name another, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(there, lesson.model_dump_json(indent=2) + "\n")


def _finished(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in ("config.json", "adapter_config.json"))


def plan(lesson: Lesson, folder: Path, say: Callable[[str], None]) -> Recipe:
    """Write the recipe of a lesson, which fits the model, the data and the machine."""
    if lesson.data is None:
        about = world_of(lesson).lesson
        train, test, samples = dict(about["train"]), dict(about["evaluate"]), SAMPLES
        say("No data are named, so it learns from pictures that are drawn")
    else:
        train, test, rows = data_of(lesson, folder)
        samples = max(EPOCHS * rows, FEWEST)
    composition = join(lesson, folder, train)
    if lesson.text is not None:
        both = ({"data": train, "weight": 1 - TEXT_SHARE}, {"data": {"path": lesson.text}, "weight": TEXT_SHARE})
        train = {"mix": list(both)}
    for note in composition.notes:
        say(note)
    model: Any = composition.model
    projectors = [f"{name}_projector" for name in model.config.modalities]
    half = stored_in_half(model)
    draft: dict[str, Any] = {
        "objective": lesson.objective,
        "model": {"checkpoint": str(folder / START)},
        "train": train,
        "evaluate": test,
        "optimizer": {
            "name": "adamw",
            "lr": RATE,
            "lr_scale": {name: scale for name, scale in FASTER.items() if lesson.lora or name != "lora_"},
        },
        "output": str(folder),
    }
    if lesson.lora:
        draft["lora"] = {"target_modules": layers_for_lora(model), "modules_to_save": projectors}
    else:
        draft["freeze"] = [rf"^(?!model\.({'|'.join(projectors)})\.)"]
    if half and not bfloat16_pays():  # this processor multiplies it slower
        draft["model"]["config"] = {"dtype": "float32"}
    draft["arguments"] = {
        "bf16": False if half else "auto",
        "lr_scheduler_type": "warmup_stable_decay",
        "eval_strategy": "steps",
        "save_total_limit": 2,
        "dataloader_num_workers": 1,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "max_grad_norm": 1.0,
        "report_to": "none",
        "seed": 0,
    }
    del composition, model
    gc.collect()
    say("Measuring what a step needs on this machine")
    path = folder / RECIPE
    first = Recipe.parse(draft, path, lesson.overrides)
    budget = measure(first)
    draft["arguments"] = _length(lesson, first.arguments, budget, samples)
    recipe = Recipe.parse(draft, path, lesson.overrides)
    write_text_whole(path, recipe.model_dump_json(indent=2, exclude_unset=True) + "\n")
    rows, steps = budget.rows * budget.accumulate, recipe.arguments["max_steps"]
    say(
        f"{budget.learning:,} parameters learn from {rows * steps:,} samples, {rows / budget.seconds:.2g} a second; that "
        f"takes about {duration(steps * budget.seconds)}"
        + ("" if lesson.minutes else ", and --minutes sets another length")
    )
    say(f"Wrote {path}")
    return recipe


def _length(lesson: Lesson, arguments: dict[str, Any], budget: Budget, samples: int) -> dict[str, Any]:
    """The arguments of `Trainer` with batches that fit into the memory, and as many steps as the time or the data allow."""
    steps = -(-samples // (budget.rows * budget.accumulate))
    if lesson.minutes is not None:
        steps = max(1, int(lesson.minutes * 60 / budget.seconds))
    steps = arguments.get("max_steps", steps)
    often = max(1, round(SAVE_EVERY / budget.seconds))
    return {
        "max_steps": steps,
        "per_device_train_batch_size": budget.rows,
        "per_device_eval_batch_size": budget.rows,
        "gradient_accumulation_steps": budget.accumulate,
        "warmup_steps": min(20, steps // 10),
        "lr_scheduler_kwargs": {"num_decay_steps": max(1, 2 * steps // 5)},
        "logging_steps": max(1, round(20 / budget.seconds)),
        "eval_steps": max(1, steps // 4),
        "save_steps": min(often, steps),
        **({"activation_checkpointing": True} if budget.checkpointing else {}),
        **arguments,
    }


def _settings(lesson: Lesson, recipe: Recipe, folder: Path) -> Asking:
    """What is asked, at the end and on the way."""
    options: dict[str, Any] = {"sight": True, "batch_size": 16}
    if isinstance(recipe.evaluate, Files):
        options |= {"data": recipe.evaluate.path}
        if lesson.prompt is not None:
            options["prompt"] = lesson.prompt
    else:
        options |= world_of(lesson).lesson["settings"]
    settings = choose_settings(folder / START, **options)
    assert isinstance(settings, Asking)
    return settings
