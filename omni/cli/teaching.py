"""The command that gives a language model a sense: teach."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import (
    AsJson,
    expect_checkpoint,
    quiet_transformers,
    refuse,
    show,
    status,
    steps,
    user_errors,
    with_encoders,
)


@app.command()
@with_encoders
def teach(
    language_model: Annotated[
        Path | None,
        typer.Argument(metavar="LANGUAGE_MODEL", help="Folder of any causal language model, or .gguf file."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="New folder for all that is made.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="What to learn: rows as omni train reads them.", show_default="drawn scenes")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Held-out rows.", show_default="a twentieth of the data")] = None,
    prompt: Annotated[str | None, typer.Option(help="Question for rows that have only a caption.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="How long to train.", show_default="as the data ask for")
    ] = None,
    objective: Annotated[
        Literal["answers", "distillation"],
        typer.Option(help="distillation: what the language model would answer to the words of a row."),
    ] = "answers",
    text: Annotated[
        Path | None, typer.Option(help="Rows without items, of which some are mixed in to keep the language.")
    ] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Let the language model learn too, by low-rank adapters.")
    ] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Put a value into the recipe.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run of this command that was stopped.")] = False,
    as_json: AsJson = False,
    **encoders: Path | None,
) -> None:
    """Teach a language model to see or hear: omni teach SmolLM2 --image checkpoints/vision_tiny --output mine."""
    folders = {name: str(folder) for name, folder in encoders.items() if folder is not None}
    if language_model is None or not folders or output is None:
        refuse(
            "Expected a language model, an encoder and a new folder, such as `omni teach SmolLM2 --image "
            "checkpoints/vision_tiny --output mine`."
        )
    if test is not None and data is None:
        refuse("--test is for data of your own; name them with --data.")
    from omni.data.layouts import expect_rows
    from omni.data.sources import ManifestError

    for folder in map(Path, folders.values()):
        expect_checkpoint(folder)
    if not language_model.is_file():
        expect_checkpoint(language_model)
    with user_errors(ManifestError):
        for rows in (data, test, text):
            if rows is not None:
                expect_rows(rows)
    quiet_transformers()
    with status("starting"):
        from tqdm.auto import tqdm

        from omni.checkpoints.folder import CheckpointError
        from omni.data.conversations import ExampleError
        from omni.evaluation import EvaluationError, render
        from omni.modality import ItemError
        from omni.teaching import Lesson
        from omni.teaching import teach as start
        from omni.training.checkpoints import CheckpointDamageError, DiskFullError, DivergenceError
        from omni.training.recipe import RecipeError
        from omni.worlds import WorldError

    lesson = Lesson(
        language_model=str(language_model),
        encoders=folders,
        data=str(data) if data else None,
        test=str(test) if test else None,
        prompt=prompt,
        objective=objective,
        text=str(text) if text else None,
        lora=lora,
        minutes=minutes,
        overrides=overrides or [],
    )
    own_errors = (CheckpointError, RecipeError, FileExistsError, CheckpointDamageError, DivergenceError, DiskFullError)
    of_data = (WorldError, ManifestError, ItemError, ExampleError, EvaluationError)
    with user_errors(*own_errors, *of_data, ValueError), steps() as progress:
        outcome = start(lesson, output, resume, lambda line: tqdm.write(line, file=sys.stderr), progress)
    if as_json:
        typer.echo(outcome.result.model_dump_json(indent=2))
        return
    show(render(outcome.result))
    typer.echo(f'Wrote {output}; ask it: omni ask FILE "QUESTION" --checkpoint {output}')
