"""Writes the recipes of a lesson, one for each stage, to suit the model, the data and the machine."""

import copy
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omni.embedding.engine import bfloat16_pays
from omni.files import write_text_whole
from omni.training.recipe import Recipe

from .budget import Budget, measure
from .lesson import START, TEXT_SHARE, Lesson, data_of, join, layers_for_lora, stored_in_half, world_of
from .watch import duration

RECIPE, STAGE = "recipe.json", "stage-{}"
"""The recipe of the last stage, and the folders of the earlier stages."""

SAMPLES = 12_000
"""Samples of a world, unless the lesson sets minutes."""
EPOCHS, FEWEST = 3, 2_000
"""Epochs over the user's rows, and the smallest number of samples, which may need more epochs."""
SAVE_EVERY = 300
"""Seconds between two checkpoints of the run."""
WARMUP, LAST_RATE = 20, 0.02
"""The longest warmup in steps, and the share of the learning rate that is left at the end. It falls linearly."""
RATE, FASTER = 4e-4, {r"_projector\.(.*\.)?(bias|positions\.weight)$": 25.0, "lora_": 2.5}
"""The learning rate of AdamW, and factors for some parameters. Biases and positions act like a prompt, and learn fastest."""

Stage = tuple[float, Mapping[str, Any]]
"""A stage's share of all steps, and its changes to the section `train`."""


def plan(lesson: Lesson, folder: Path, say: Callable[[str], None]) -> None:
    """Compose the model and write the recipes of a lesson into its folder; `recipes_in` lists them.

    Args:
        lesson: the lesson.
        folder: its folder.
        say: called with each line of progress.

    Raises the errors of `omni.training.run.run` about recipes, models and data.
    """
    stages: Sequence[Stage] = ((1.0, {}),)
    if lesson.data is None:
        about = world_of(lesson).lesson
        train, test, samples = dict(about["train"]), dict(about["evaluate"]), SAMPLES
        stages = about["stages"]
        say("No data are named, so it learns from generated pictures")
    else:
        train, test, rows = data_of(lesson, folder)
        samples = max(EPOCHS * rows, FEWEST)
    composition = join(lesson, folder, train)
    if lesson.text is not None:
        both = ({"data": train, "weight": 1 - TEXT_SHARE}, {"data": {"path": lesson.text}, "weight": TEXT_SHARE})
        train = {"sources": list(both)}
    for note in composition.notes:
        say(note)
    frozen = [rf"^(?!model\.({'|'.join(_projectors(composition.model))})\.)"]
    draft = _draft(lesson, folder, composition.model, train, test)
    if not lesson.lora:
        draft["freeze"] = frozen
    del composition
    gc.collect()
    say("Measuring what a step needs on this machine")
    path = folder / RECIPE
    recipe = Recipe.parse(draft, path, lesson.overrides)
    budget = measure(recipe)
    rows = budget.rows * budget.accumulate
    steps = -(-samples // rows)
    if lesson.minutes is not None:
        steps = max(1, int(lesson.minutes * 60 / budget.seconds))
    steps = recipe.arguments.get("max_steps", steps)
    base = json.loads(recipe.model_dump_json(indent=2, exclude_unset=True))
    made = list(_stages(base, stages, steps, budget, frozen))
    for number, values in enumerate(made, start=1):
        place = path if number == len(made) else folder / f"{STAGE.format(number)}.json"
        Recipe.parse(values, place)
        write_text_whole(place, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    total = sum(values["arguments"]["max_steps"] for values in made)
    say(
        f"{budget.learning:,} parameters learn from {rows * total:,} samples, {rows / budget.seconds:.2g} a second; that "
        f"takes about {duration(total * budget.seconds)}"
        + ("" if lesson.minutes else ", and --minutes sets another length")
    )
    say(f"Wrote {path}")


def recipes_in(folder: Path) -> list[Path]:
    """The paths of the recipes that `plan` has written, in order of the stages."""
    stages = sorted(folder.glob(f"{STAGE.format('*')}.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [*stages, folder / RECIPE]


def _projectors(model: Any) -> list[str]:
    return [f"{name}_projector" for name in model.config.modalities]


def _draft(lesson: Lesson, folder: Path, model: Any, train: dict[str, Any], test: Any) -> dict[str, Any]:
    """The recipe without the numbers that depend on this machine."""
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
        "arguments": {
            "bf16": False if half else "auto",
            "eval_strategy": "steps",
            "save_total_limit": 2,
            "dataloader_num_workers": 1,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "max_grad_norm": 1.0,
            "report_to": "none",
            "seed": 0,
        },
    }
    if lesson.lora:
        draft["lora"] = {"target_modules": layers_for_lora(model), "modules_to_save": _projectors(model)}
    if half and not bfloat16_pays():  # this processor computes faster in float32
        draft["model"]["config"] = {"dtype": "float32"}
    return draft


def _stages(
    base: dict[str, Any], stages: Sequence[Stage], steps: int, budget: Budget, frozen: list[str]
) -> Iterator[dict[str, Any]]:
    """The recipe of each stage. Adapters are trained only in the last stage, because no recipe can continue from them."""
    begun, rate, checkpoint = 0.0, base["optimizer"]["lr"], base["model"]["checkpoint"]
    for number, (share, changes) in enumerate(stages, start=1):
        values = copy.deepcopy(base)
        values["model"]["checkpoint"] = checkpoint
        train = values["train"]
        part = train["sources"][0]["data"] if "sources" in train else train
        part |= {key: value for key, value in changes.items() if key not in part}
        if number < len(stages):
            values["output"] = checkpoint = str(Path(base["output"]) / STAGE.format(number))
            if values.pop("lora", None) is not None:
                values["freeze"] = frozen
                values["optimizer"]["lr_scale"].pop("lora_", None)
        left, ends = 1 - begun, max(1 - begun - share, LAST_RATE)
        values["optimizer"]["lr"] = rate * left
        values["arguments"] = _arguments(base["arguments"], max(1, round(steps * share)), budget, ends / left)
        begun += share
        yield values


def _arguments(given: dict[str, Any], steps: int, budget: Budget, ends: float) -> dict[str, Any]:
    """The arguments of `Trainer` for this number of steps. The learning rate falls to the share `ends`."""
    often, warmup = max(1, round(SAVE_EVERY / budget.seconds)), min(WARMUP, steps // 10)
    falling = {"num_decay_steps": steps - warmup, "decay_type": "linear", "min_lr_ratio": ends}
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": falling}
    return {
        "per_device_train_batch_size": budget.rows,
        "per_device_eval_batch_size": budget.rows,
        "gradient_accumulation_steps": budget.accumulate,
        "warmup_steps": warmup,
        **({} if "lr_scheduler_type" in given else schedule),
        "logging_steps": max(1, round(20 / budget.seconds)),
        "eval_steps": max(1, steps // 4),
        "save_steps": min(often, steps),
        **({"activation_checkpointing": True} if budget.checkpointing else {}),
        **given,
        "max_steps": steps,
    }
