"""The commands that work on the folder of a checkpoint: checkpoint seal, checkpoint merge, checkpoint familiarise."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import AsJson, quiet_transformers, refuse, status, steps, user_errors

group = typer.Typer(help="Work on the folder of a checkpoint.", no_args_is_help=True)
app.add_typer(group, name="checkpoint")


@group.command()
def seal(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder whose files you changed.")],
    as_json: AsJson = False,
) -> None:
    """Seal a checkpoint again after you changed its files: omni checkpoint seal FOLDER.

    Loading compares the files with the seal. The seal keeps a note of what you changed.
    """
    from omni.checkpoints.folder import CheckpointError, expect_folder

    with user_errors(CheckpointError):
        expect_folder(folder)
    from omni.checkpoints.fingerprints import renew_fingerprints
    from omni.checkpoints.seal import reseal

    with user_errors(CheckpointError):
        parts = renew_fingerprints(folder)
        files = reseal(folder, parts)
    happened = {**{f"weights of {part}": "changed" for part in parts}, **files}
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(folder), "files": happened}, indent=2))
        return
    for what, how in happened.items():
        typer.echo(f"{how}: {what}")
    typer.echo(f"{folder} is sealed with its current files.")


@group.command()
def merge(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of adapters, or of parts that are elsewhere.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the weights.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Write a model whole, with its adapters merged and its parts in one folder: omni checkpoint merge mine whole."""
    from omni.checkpoints.folder import CheckpointError, expect_folder, expect_new

    with user_errors(CheckpointError, FileExistsError):
        expect_folder(folder)
        expect_new(output)
    with status("starting"):
        import torch

        from omni.loading.checkpoint import load, save_new
    quiet_transformers()
    with user_errors(CheckpointError, FileExistsError), status("merging"):
        model, processor = load(folder)
        model.config.parts_from = None
        save_new(model.to(getattr(torch, dtype)), processor, output)
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(output), "dtype": dtype}, indent=2))
    else:
        typer.echo(f"Wrote {output}")


def _rows(
    folder: Path, recipe: Path | None, changes: list[str] | None, data: Path | None, held_out: Path | None
) -> tuple[Any, Any]:
    """The rows of training, and rows like them that are held out or None."""
    from omni.checkpoints.folder import prompt_of
    from omni.training.recipe import Recipe, RecipeError
    from omni.training.sections import Files

    if recipe is None:
        prompt = prompt_of(folder)
        others = None if held_out is None else Files(path=str(held_out), prompt=prompt)
        return Files(path=str(data), prompt=prompt), others
    read = Recipe.read(recipe, changes)
    if read.objective != "answers":
        raise RecipeError(
            f"The recipe {str(recipe)!r} trains for {read.objective!r}, expected 'answers'; name the one that the model "
            "learnt to answer by."
        )
    return read.train, read.evaluate


@group.command()
def familiarise(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a fused model, or of its adapters.")],
    recipe: Annotated[
        Path | None, typer.Option(help="Its recipe: rows of `train`, held-out rows of `evaluate`.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows that it was trained on, without a recipe.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Rows like these that it was not trained on.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A change to the recipe: train.voices=voices.")
    ] = None,
    rows: Annotated[int, typer.Option(min=100, help="Rows to look at, and as many held-out ones.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Note in a checkpoint what it was trained on: omni checkpoint familiarise FOLDER --data rows.jsonl.

    Then answers say how sure they are, and what is unlike training. `omni train` does it at the end.
    """
    from omni.checkpoints.folder import CheckpointError, expect_answers

    if (recipe is None) == (data is None):
        refuse("Expected --recipe or --data, one of them; a recipe names the rows that it trained on.")
    if recipe is not None and held_out is not None:
        refuse("A recipe names its held-out rows; leave out --held-out, or give --data.")
    if recipe is None and changes:
        refuse("--set changes a recipe; give --recipe, or leave it out.")
    with user_errors(CheckpointError):
        expect_answers(folder)
    with status("starting"):
        from omni.data.sources import ManifestError
        from omni.familiarise import familiarise
        from omni.modality import ItemError
        from omni.registry import get_modality
        from omni.training.answers import conversations
        from omni.training.recipe import RecipeError
        from omni.worlds import WorldError
    quiet_transformers()
    with user_errors(CheckpointError, ManifestError, ItemError, RecipeError, WorldError), steps() as progress:
        train, others = _rows(folder, recipe, changes, data, held_out)
        found = familiarise(folder, conversations(train), conversations(others), rows, progress=progress)
    if found is None:
        refuse("Too few rows to say what training was like; name more.")
    if as_json:
        known = {"items": sorted(found.items), "question": found.question is not None}
        calibration = found.calibration and found.calibration.model_dump()
        typer.echo(json.dumps({"checkpoint": str(folder), **known, "calibration": calibration}, indent=2))
        return
    nouns = [f"{get_modality(name).noun}s" for name in sorted(found.items)] + (["questions"] if found.question else [])
    typer.echo(f"{folder} now knows what {' and '.join(nouns) or 'nothing'} of training are like.")
    if found.calibration is None:
        typer.echo(
            "It does not know how sure its answers are, because that needs held-out rows; name some with --held-out."
        )
    else:
        typer.echo(
            f"Its confidence was measured on {found.calibration.answers:,} held-out answers, {found.calibration.right:.1%} "
            "of them right."
        )
