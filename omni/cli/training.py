"""The commands that train and check data: train, check-data."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from omni.cli.commands import app
from omni.cli.console import AllowPrivate, AsJson, quiet_transformers, refuse, show, steps, user_errors


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="JSON file, such as configs/train_omni_scenes.json.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value: --set optimizer.lr=0.001")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint of an earlier run.")
    ] = False,
) -> None:
    """Train a model as a recipe describes it."""
    from omni.training.recipe import Recipe, RecipeError

    with user_errors(RecipeError):
        read = Recipe.read(recipe, overrides)
    from transformers.utils import logging

    from omni.data.conversations import ExampleError
    from omni.data.sources import ManifestError
    from omni.modality import ItemError
    from omni.training.checkpoints import CheckpointDamageError, DiskFullError, DivergenceError
    from omni.training.run import last_checkpoint, run

    if not sys.stderr.isatty():  # bars would fill a log
        logging.disable_progress_bar()
    if resume and last_checkpoint(read) is None:
        typer.echo(f"Nothing to resume in {read.output}, so this is a new run.", err=True)
    own_errors = (FileExistsError, RecipeError, CheckpointDamageError, DivergenceError, DiskFullError)
    with user_errors(*own_errors, ManifestError, ItemError, ExampleError):
        typer.echo(run(read, resume=resume))


@app.command("check-data")
def check_data(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder of files, or a .jsonl, .json, .csv, .parquet or .tar file."),
    ],
    test: Annotated[str | None, typer.Option(help="Held-out data, which must not share files.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model: count tokens, too.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest row, in tokens.", show_default="as in training")
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that paths start from.", show_default="that of the file")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Question for rows that have only a caption.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Read so many rows of each set, at random.", show_default="all")
    ] = None,
    addresses: Annotated[
        Path | None, typer.Option(help="Allow addresses; folder for what is downloaded.", show_default="none allowed")
    ] = None,
    allow_private: AllowPrivate = False,
    as_json: AsJson = False,
) -> None:
    """Read a whole data set and list its problems. The exit status is 1 if there is one."""
    from omni.data.checking import check, chosen
    from omni.data.manifests import Manifest
    from omni.data.problems import first_of_each, render
    from omni.data.sources import ManifestError

    if max_length is not None and checkpoint is None:
        refuse("--max-length counts tokens, which needs a model; add --checkpoint with its folder.")
    with user_errors(ManifestError):
        manifests = {"train": Manifest.read(path, root, prompt, addresses=addresses, allow_private=allow_private)}
        if test is not None:
            manifests["test"] = Manifest.read(test, root, prompt, addresses=addresses, allow_private=allow_private)
    processor, positions = (None, None) if checkpoint is None else _reader(checkpoint)
    total = sum(len(chosen(len(manifest), sample)) for manifest in manifests.values())
    with steps(in_pipes=True) as progress:

        def advance(done: int) -> None:
            progress("reading rows and files", done, total)

        report = check(manifests, processor, max_length, positions, sample=sample, progress=advance)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    elif report.problems:
        show(render(report))
        typer.echo("\n".join(first_of_each(report)))
    else:
        typer.echo(f"{report.counted}, nothing found")
    if not report.clean:
        raise typer.Exit(1)


def _reader(checkpoint: Path) -> tuple[Any, int | None]:
    """The processor of a fused model, and the number of positions of its Thinker; None if that has no limit."""
    if not (checkpoint / "processor_config.json").is_file():
        refuse(f"The checkpoint {str(checkpoint)!r} has no processor_config.json; name a fused model's folder.")
    from omni.fusion.configuration_omni import OmniConfig
    from omni.fusion.processing_omni import OmniProcessor

    quiet_transformers()
    with user_errors(ValueError, OSError):
        processor = OmniProcessor.from_pretrained(checkpoint)
        thinker = OmniConfig.from_pretrained(checkpoint).text_config
    return processor, getattr(thinker, "max_position_embeddings", None)
