"""Output that all commands share: errors in one sentence, progress, tables, files; and the shipped checkpoints."""

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import omni
from omni.registry import modalities

SHIPPED = "checkpoints/omni_tiny"
SHIPPED_ENCODER = "checkpoints/vision_world"

SECONDS_BETWEEN_LINES = 10.0

Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Precision of the weights; auto: the one that the checkpoint names."),
]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private", help="Download from this machine and private networks too.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, for scripts.")]


def with_encoders(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each modality that is installed: `--image FOLDER`. No plug-in is loaded for it."""
    signature = inspect.signature(command)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    try:
        names = [name for name in modalities() if name not in signature.parameters]
    except ValueError:  # two packages of one name; the first use of a modality raises it again
        names = []
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option(f"--{name.replace('_', '-')}", help=f"Encoder of {name}: folder.")
            ],
        )
        for name in names
    ]
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    vars(command)["__signature__"] = signature.replace(parameters=[own[0], *options, *own[1:]])
    command.__annotations__ |= {each.name: each.annotation for each in options}
    return command


@contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds, the user's mistakes, into one sentence and exit status 2."""
    try:
        yield
    except kinds as error:
        # the message of an error in a worker of a DataLoader is the worker's traceback; the sentence stands at its end
        refuse(str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip())


def refuse(sentence: str) -> NoReturn:
    """End the command: the sentence on stderr, exit status 2."""
    typer.echo(f"Error: {sentence.removesuffix('.')}.", err=True)
    raise typer.Exit(2)


def quiet_transformers() -> None:
    """Silence the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show(renderable: Any) -> None:
    """Print a table, as wide as the terminal, or 120 columns wide into a file."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(renderable)


@contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with a text on stderr, if that is a terminal. Yields a function that changes the text."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext() as status:
        yield status.update if status else lambda text: None


@contextmanager
def steps(in_pipes: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress bars on stderr, if that is a terminal: one for each step, by its name.

    Args:
        in_pipes: write a line now and then if it is not.
    """
    if in_pipes and not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(label: str, done: int, total: int) -> None:
            task = tasks[label] if label in tasks else tasks.setdefault(label, bar.add_task(label))
            bar.update(task, completed=done, total=total)

        yield advance


def _lines() -> Callable[[str, int, int], None]:
    """Writes how far a step has come, at most every ten seconds."""
    said = time.monotonic()

    def advance(label: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            typer.echo(f"{label}: {done:,} of {total:,}", err=True)

    return advance


@contextmanager
def file_progress() -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if that is a terminal: number of files, files per second, remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, rate="")
        before, start = None, 0.0

        def advance(done: int, total: int) -> None:
            nonlocal before, start
            if before is None:
                before, start = done, time.perf_counter()
            rate = f"{(done - before) / (time.perf_counter() - start):,.0f} files/s" if done > before else ""
            bar.update(task, completed=done, total=total, rate=rate)

        yield advance


def expect_checkpoint(folder: Path) -> None:
    """Refuse a folder that holds no checkpoint, before anything heavy is imported."""
    from omni.checkpoints.folder import CheckpointError, base_of, expect_folder, model_type_of

    with user_errors(CheckpointError):
        expect_folder(folder)
        model_type_of(base_of(folder))


def expect_place(path: Path) -> None:
    """Refuse the name of a file that cannot be made, because there is no such folder."""
    if not path.absolute().parent.is_dir():
        refuse(f"{str(path)!r} cannot be written, because its folder does not exist; make it first.")


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file, and say on stderr that it was written or replaced."""
    existed = path.exists()
    with user_errors(OSError):
        write(path)
    typer.echo(f"{'Replaced' if existed else 'Wrote'} {path}", err=True)


def shipped_encoder(modality: str) -> Path:
    """The folder of the shipped encoder of a modality: see `shipped_checkpoint`."""
    from omni.checkpoints.folder import model_type_of
    from omni.registry import get_modality

    bundle, shipped = get_modality(modality), shipped_checkpoint().parent
    for config in sorted(shipped.glob("*/config.json")):
        if model_type_of(config.parent) == bundle.config_class.model_type:
            return config.parent
    refuse(f"No encoder of {bundle.noun}s is shipped; name a folder with --checkpoint.")


def shipped_checkpoint(name: str = SHIPPED) -> Path:
    """The folder of a shipped checkpoint: in the current folder, or in the repository that omni is installed from."""
    for root in (Path(), Path(omni.__file__).parent.parent):
        if (root / name).is_dir():
            return root / name
    refuse(
        f"The shipped checkpoint {name!r} is neither in this folder nor beside the installed package; run the "
        "command in a clone of the repository, or name a folder with --checkpoint."
    )
