"""The command `omni`: a subcommand reads its arguments, calls one function of the library and prints what it returns.

Whatever is heavy is imported inside of a command, so that `omni --help` and shell completion answer at once. What goes
wrong because of what somebody passed is one sentence on stderr and exit status 2; it is converted where it can happen,
so that a bug of ours still shows its traceback.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import omni

SHIPPED = "checkpoints/omni_tiny"

app = typer.Typer(
    help="Ask about pictures, look into models, and train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug is reported best with the plain traceback that everybody knows
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]


def main() -> None:
    """Run the command; the entry point of the installed package."""
    app()


@contextmanager
def _mistakes(*kinds: type[Exception]) -> Iterator[None]:
    """Inside, exceptions of these kinds are the user's mistakes: told in a sentence, exit status 2, no traceback."""
    try:
        yield
    except kinds as error:
        _refuse(str(error))


def _refuse(sentence: str) -> NoReturn:
    typer.echo(f"Error: {sentence.removesuffix('.')}.", err=True)
    raise typer.Exit(2)


def _quiet() -> None:
    """No progress bars and advice of transformers around an answer."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _show(renderable: Any) -> None:
    """Print a table: on a terminal as wide as that is, into a file as wide as it needs."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(renderable)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"omni {omni.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def ask(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="JPEG, PNG, WebP, GIF, BMP or TIFF files.")
    ] = None,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about them, in quotes.")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model.", show_default=SHIPPED)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    as_json: AsJson = False,
) -> None:
    """Ask about one or more pictures: omni ask photo.jpg "what color is the circle?"."""
    from omni.data.pictures import PictureError, read_picture

    if not pictures:
        _refuse(f"Expected picture files and after them a question in quotes, found only {question!r}.")
    with _mistakes(PictureError):
        opened = [read_picture(path) for path in pictures]
    folder = checkpoint or _shipped_checkpoint()
    start = time.perf_counter()
    from omni.answering import CheckpointError, QuestionError, answer, check_question, load

    _quiet()
    with _mistakes(CheckpointError, QuestionError):
        question = check_question(question)
        model, processor = load(folder)
        loaded = time.perf_counter()
        result = answer(model, processor, opened, question, max_new_tokens)
    if as_json:
        seconds = {"loading": round(loaded - start, 3), **result.seconds}
        typer.echo(result.model_copy(update={"seconds": seconds}).model_dump_json(indent=2))
    else:
        typer.echo(result.answer)


@app.command()
def inspect(
    encoder: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder or JSON configuration.")],
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: a side, or HEIGHTxWIDTH.", show_default="its own")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    depth: Annotated[
        int | None, typer.Option(min=0, help="How deep to look into the parts.", show_default="all")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Walk through a vision encoder: shape, parameters, FLOPs and memory of every layer."""
    from omni.inspection import inspect_encoder, render

    with _mistakes(ValueError):
        report = inspect_encoder(encoder, _sides(image_size) if image_size else None, batch)
    if depth is not None:
        report = report.model_copy(update={"rows": tuple(row for row in report.rows if row.depth <= depth)})
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _show(render(report))


@app.command()
def modalities(as_json: AsJson = False) -> None:
    """List the registered modalities and where each comes from."""
    with _mistakes(ValueError):
        origins = omni.modalities()
    if as_json:
        typer.echo(json.dumps(origins, indent=2))
    else:
        width = max(map(len, origins))
        typer.echo("\n".join(f"{name:<{width}}  {origin}" for name, origin in origins.items()))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="JSON file, such as configs/train_omni_tiny.json.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value: --set optimizer.lr=0.001")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an earlier run.")] = False,
) -> None:
    """Train what a recipe describes."""
    from omni.training.recipe import Recipe

    with _mistakes(ValueError):
        read = Recipe.read(recipe, overrides)
    from omni.training.run import run

    with _mistakes(FileExistsError):
        typer.echo(run(read, resume=resume))


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model.")],
    pictures: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 500,
    split: Annotated[
        Literal["test", "pairs"], typer.Option(help="Scenes; pairs: never-trained shape and colour.")
    ] = "test",
    wordings: Annotated[Literal["seen", "held_out"], typer.Option(help="Those of training, or others.")] = "seen",
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Ask only this kind; may be repeated.")] = None,
    sight: Annotated[bool, typer.Option("--sight", help="Ask again with the picture blank, swapped, noise.")] = False,
    as_json: AsJson = False,
) -> None:
    """Exact match on held-out scenes by kind of question, with 95 % intervals and the best constant answer."""
    from omni.answering import CheckpointError, load
    from omni.evaluation import SIGHTS, evaluate_scenes, render, uses_the_picture

    _quiet()
    with _mistakes(CheckpointError):
        model, processor = load(checkpoint)
    found = []
    for shown in SIGHTS if sight else SIGHTS[:1]:
        with _mistakes(ValueError), _progress(f"asking, {shown} pictures", pictures) as advance:
            evaluation, _ = evaluate_scenes(
                model,
                processor,
                split=split,
                pictures=pictures,
                wordings=wordings,
                sight=shown,
                kinds=kinds,
                progress=advance,
            )
        found.append(evaluation)
        if not as_json:
            _show(render(evaluation))
    if as_json:
        typer.echo(json.dumps([evaluation.model_dump() for evaluation in found], indent=2))
    if sight and not uses_the_picture(found):
        typer.echo("The sight test failed: without the picture the answers are as good as with it.", err=True)
        raise typer.Exit(1)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=done)


def _shipped_checkpoint() -> Path:
    """The checkpoint that comes with omni: in this folder, or in the repository that omni was installed from."""
    for root in (Path(), Path(omni.__file__).parent.parent):
        if (root / SHIPPED).is_dir():
            return root / SHIPPED
    _refuse(
        f"The shipped checkpoint {SHIPPED!r} is neither in this folder nor beside the installed package; run the "
        "command in a clone of the repository, or name a folder with --checkpoint."
    )


def _sides(text: str) -> tuple[int, int]:
    """Height and width from "224" or "320x160"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None:
        raise ValueError(f"An image size looks like 224 or 320x160 (height x width), found {text!r}.")
    return int(sides[1]), int(sides[2] or sides[1])
