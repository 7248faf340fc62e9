"""Teach: from a lesson to a checkpoint with a card. A lesson that was interrupted can be resumed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omni.evaluation import Outcome, choose_settings, evaluate, update_card
from omni.evaluation.settings import Asking
from omni.files import write_text_whole
from omni.fusion.processing_omni import OmniProcessor
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import last_checkpoint, run
from omni.training.sections import Files

from .card import write_card
from .lesson import START, Lesson, world_of
from .plan import RECIPE, plan, recipes_in
from .watch import Watch

LESSON, RESULT, CARD = "lesson.json", "evaluation.json", "README.md"


def teach(
    lesson: Lesson,
    output: str | Path,
    resume: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Outcome:
    """Compose, train, evaluate, and write a card.

    Args:
        lesson: the parts, the data and the settings.
        output: a new folder, or with `resume` the folder of the same lesson.
        resume: continue an interrupted lesson.
        say: called with each line of progress.
        progress: see `omni.evaluation.evaluate`.

    Returns:
        The final evaluation.

    Raises:
        FileExistsError: the folder is not empty, and `resume` is not set.
        RecipeError: the folder belongs to another lesson; and the errors of a run (`omni.training.run.run`).
        CheckpointError: a part cannot be used.
        WorldError, ManifestError, ItemError, ExampleError, EvaluationError: data cannot be used.
    """
    folder = Path(output)
    _begin(lesson, folder, resume)
    if not (folder / RECIPE).is_file():
        try:
            plan(lesson, folder, say)
        except ValueError:  # the lesson cannot be taught, so there is nothing to resume
            shutil.rmtree(folder)
            raise
    recipes = [Recipe.read(path) for path in recipes_in(folder)]
    settings = _settings(lesson, recipes[-1], folder)
    questions, processor = settings.questionnaire(), OmniProcessor.from_pretrained(folder / START)
    for number, recipe in enumerate(recipes):
        if not _finished(Path(recipe.output)):
            watch = Watch(questions, processor, say, [each.arguments["max_steps"] for each in recipes], number)
            run(recipe, last_checkpoint(recipe) is not None, watch)
    outcome = evaluate(folder, settings, progress)
    outcome.result.write(folder / RESULT)
    write_card(folder / CARD, lesson, recipes, folder)
    update_card(folder / CARD, outcome.result)
    return outcome


def _begin(lesson: Lesson, folder: Path, resume: bool) -> None:
    """Write the lesson into its folder.

    Raises:
        FileExistsError: the folder is not empty, and `resume` is not set.
        RecipeError: the folder belongs to another lesson.
    """
    there = folder / LESSON
    if there.is_file():
        if not resume:
            raise FileExistsError(
                f"{str(folder)!r} holds a lesson already; continue with --resume, or name another output."
            )
        before = json.loads(there.read_text(encoding="utf-8"))
        now = lesson.model_dump()
        if changed := sorted(key for key in now if now[key] != before.get(key)):
            raise RecipeError(
                f"The lesson in {str(folder)!r} began with another {', '.join(changed)}; give the values in "
                f"{str(there)!r}, or name another output."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"Expected a new folder, but {str(folder)!r} exists already; name another, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(there, lesson.model_dump_json(indent=2) + "\n")


def _finished(folder: Path) -> bool:
    return any(os.path.exists(folder / name) for name in ("config.json", "adapter_config.json"))


def _settings(lesson: Lesson, recipe: Recipe, folder: Path) -> Asking:
    """The settings of the evaluation, whose questions are also asked during training."""
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
