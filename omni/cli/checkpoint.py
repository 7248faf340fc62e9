"""The commands that work on the folder of a checkpoint: checkpoint seal."""

import json
from pathlib import Path
from typing import Annotated

import typer

from omni.cli.commands import app
from omni.cli.console import AsJson, user_errors

group = typer.Typer(help="Work on the folder of a checkpoint.", no_args_is_help=True)
app.add_typer(group, name="checkpoint")


@group.callback()
def _group() -> None:
    """Without this, typer would drop the name of a group's only command."""


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
