"""What is done to the folder of a checkpoint itself."""

from pathlib import Path
from typing import Annotated

import typer

from omni.cli.commands import app
from omni.cli.console import user_errors

group = typer.Typer(help="Look after the folder of a checkpoint.", no_args_is_help=True)
app.add_typer(group, name="checkpoint")


@group.callback()
def _group() -> None:
    """Keep the name of a command that is the only one."""


@group.command()
def seal(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Whose files were changed on purpose.")],
) -> None:
    """Seal a checkpoint as it is now, after a change that is meant: omni checkpoint seal FOLDER.

    Every loading compares the files with the seal. What was changed is noted in it.
    """
    from omni.checkpoints.fingerprints import renew_fingerprints
    from omni.checkpoints.folder import CheckpointError, expect_folder
    from omni.checkpoints.seal import reseal

    with user_errors(CheckpointError):
        expect_folder(folder)
        parts = renew_fingerprints(folder)
        files = reseal(folder, parts)
    for what, happened in {**{f"weights of {part}": "changed" for part in parts}, **files}.items():
        typer.echo(f"{happened}: {what}")
    typer.echo(f"{folder} is sealed as it is now.")
