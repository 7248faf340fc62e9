"""The commands of the scenes: speak, ask."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .corpus import make
from .hearing_sets import write_sets
from .voices import Group

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def speak(
    folder: Annotated[Path, typer.Argument(help="Where the sounds and their manifests are.")],
    synthesizer: Annotated[str, typer.Option(help="Which synthesizer speaks; see omni.scenes.voices.")],
    count: Annotated[int, typer.Option(min=1, help="Number of sayings.")] = 1000,
    split: Annotated[Literal["train", "test"], typer.Option(help="Sayings of training, or of evaluation.")] = "train",
    group: Annotated[Group, typer.Option(help="Who says it.")] = "seen",
) -> None:
    """Let a synthesizer speak the sayings that are not in the folder yet."""
    typer.echo(make(folder, synthesizer, count, split, group))


@app.command()
def ask(folder: Annotated[Path, typer.Argument(help="Folder of `speak`, with sayings of the split test.")]) -> None:
    """Write manifests that ask a model by voice, for `omni evaluate --data`."""
    for path in write_sets(folder):
        typer.echo(path)


if __name__ == "__main__":
    app()
