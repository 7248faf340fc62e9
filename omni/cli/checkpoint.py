"""The commands that work on the folder of a checkpoint: checkpoint seal, checkpoint merge."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import AsJson, quiet_transformers, status, user_errors

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
    from omni.checkpoints.fingerprints import renew_fingerprints
    from omni.checkpoints.folder import CheckpointError, expect_folder
    from omni.checkpoints.seal import reseal

    with user_errors(CheckpointError):
        expect_folder(folder)
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
