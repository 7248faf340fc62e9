"""The command `omni`: a subcommand reads its arguments, calls one function of the library and prints what it returns.

Whatever is heavy is imported inside of a command, so that `omni --help` and shell completion answer at once. What goes
wrong because of what somebody passed is one sentence on stderr and exit status 2; it is converted where it can happen,
so that a bug of ours still shows its traceback.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import omni
from omni.cli import checkpoint as checkpoint_commands

SHIPPED = "checkpoints/omni_tiny"
SHIPPED_ENCODER = "checkpoints/vision_tiny"

app = typer.Typer(
    help="Ask about pictures, embed them, look into models, and train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug is reported best with the plain traceback that everybody knows
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(checkpoint_commands.app, name="checkpoint")

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
        # a worker of a DataLoader hands on the class of an error, and its traceback as the message
        _refuse(str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].rstrip())


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
    from omni.vision.pictures import PictureError, read_picture

    if not pictures:
        _refuse(f"Expected picture files and after them a question in quotes, found only {question!r}.")
    if _names_a_picture(question):
        _refuse(f"Expected a question in quotes after the pictures, found the file {question!r}; add the question.")
    with _mistakes(PictureError):
        opened = [read_picture(path) for path in pictures]
    folder = checkpoint or _shipped_checkpoint()
    from omni.checkpoints.folder import CheckpointError, expect_answers

    with _mistakes(CheckpointError):  # before anything that takes seconds
        expect_answers(folder)
    start = time.perf_counter()
    with _status("starting"):
        from omni.loading.checkpoint import load
        from omni.session import QuestionError, answer, check_question

    _quiet()
    with _mistakes(CheckpointError, QuestionError), _status("loading") as say:
        question = check_question(question)
        model, processor = load(folder)
        loaded = time.perf_counter()
        say("answering")
        result = answer(model, processor, opened, question, max_new_tokens)
    if as_json:
        seconds = {"loading": round(loaded - start, 3), **result.seconds}
        typer.echo(result.model_copy(update={"seconds": seconds}).model_dump_json(indent=2))
    else:
        typer.echo(result.answer)
    if not result.complete:
        typer.echo(f"The answer was cut after {max_new_tokens} tokens; raise --max-new-tokens for the rest.", err=True)
    elif not result.answer:
        typer.echo("The model ended its answer before the first word.", err=True)


def _names_a_picture(question: str) -> bool:
    """Whether a file stands where a question should."""
    return os.path.isfile(question) or bool(
        re.fullmatch(r"\S+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?)", question, re.IGNORECASE)
    )


@app.command()
def embed(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="PICTURES", help="Folder, pattern in quotes, or manifest; several may be given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="One file if it ends with .parquet, else a folder of them.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of an encoder.", show_default=SHIPPED_ENCODER)] = None,
    what: Annotated[
        Literal["cls", "grid", "projected"], typer.Option(help="One vector, all patches, or what a Thinker gets.")
    ] = "cls",
    precision: Annotated[Literal["float32", "bfloat16", "auto"], typer.Option(help="Of the arithmetic.")] = "float32",
    decode: Annotated[
        Literal["exact", "scaled"], typer.Option(help="scaled: JPEG files at 1/2, 1/4 or 1/8; faster, not the same.")
    ] = "exact",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that a core encodes together.")] = 32,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of each file of a folder.", show_default="about 10000, or 128 MiB")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This machine, or a cluster of Ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the cluster.", show_default="this machine alone")] = None,
    as_json: AsJson = False,
) -> None:
    """Embed many pictures into a Parquet table: omni embed photos --output out.parquet."""
    if not sources or output is None:
        _refuse("Expected pictures and where to write, such as `omni embed photos --output out.parquet`.")
    if address is not None and engine != "ray":
        _refuse("--address is that of a Ray cluster; add --engine ray, or leave it out.")
    folder = checkpoint or _shipped_checkpoint(SHIPPED_ENCODER)
    from omni import embedding as encoding
    from omni.checkpoints.strict import CheckpointError
    from omni.data.sources import ManifestError

    _quiet()
    of_encoding = (encoding.SourceError, encoding.EngineError, encoding.TableError, encoding.RayError)
    try:
        with _mistakes(*of_encoding, ManifestError, CheckpointError), _files() as progress:
            report = encoding.embed(
                sources,
                folder,
                output,
                what=what,
                precision=precision,
                decode=decode,
                batch_size=batch_size,
                shard_rows=shard_rows,
                resume=resume,
                runner=engine,
                address=address,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command with --resume goes on from here.", err=True)
        raise typer.Exit(130) from None
    if report.unreadable:
        typer.echo(
            f"{report.unreadable:,} of {report.rows:,} files have no embedding; the column `error` says why.", err=True
        )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        rate = f"{report.files_per_second:,} files/s" if report.computed else "all of them from before"
        typer.echo(f"{report.rows:,} rows in {report.output}, {rate}")


@app.command()
def attend(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="A picture; with a question several may be given.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Show where the Thinker looks for the words of its answer."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The maps over the pictures, as .png.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of a fused model, or of an encoder.", show_default=f"{SHIPPED}, {SHIPPED_ENCODER}"),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Of the encoder.", show_default="the last")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    as_json: AsJson = False,
) -> None:
    """See where an encoder looks, or with a question the Thinker: omni attend photo.jpg --output map.png."""
    from omni.vision.pictures import PictureError, read_picture

    if question is None:
        _refuse("Expected a picture file, and after it a question in quotes if there is one; found nothing.")
    if not pictures:
        pictures, question = [question], None
    elif _names_a_picture(question):
        _refuse(f"Expected a question after several pictures, found the file {question!r}; ask, or pass one picture.")
    if question is not None and layer is not None:
        _refuse("--layer is one of the encoder, and a question is about the Thinker; leave one of them out.")
    if output is None and not as_json:
        _refuse("Nothing would be left of it; name a picture to write with --output map.png, or add --json.")
    if output is not None and output.suffix.lower() != ".png":
        _refuse(f"The maps are written as PNG, so the file's name should end with .png, found {str(output)!r}.")
    if output is not None and not output.absolute().parent.is_dir():
        _refuse(f"{str(output)!r} cannot be written, as its folder does not exist; make it first.")
    with _mistakes(PictureError):
        opened = [read_picture(path) for path in pictures]
    folder = checkpoint or _shipped_checkpoint(SHIPPED_ENCODER if question is None else SHIPPED)
    with _status("starting"):
        from omni.checkpoints.strict import CheckpointError
        from omni.loading.checkpoint import load, model_type_of
        from omni.loading.encoder import load_encoder
        from omni.looking import attention
        from omni.session import QuestionError, check_question

    _quiet()
    about: dict[str, Any] = {"pictures": pictures, "checkpoint": str(folder)}
    with _mistakes(CheckpointError, QuestionError, attention.AttentionError), _status("looking"):
        if question is None:
            model_type_of(folder)  # or there is none
            encoder = load_encoder(folder)
            looks = attention.encoder_attention(encoder, opened[0], layer)
            drawn = attention.draw_encoder(looks, encoder, opened[0])
            about |= {**vars(looks), "mean": looks.mean}
        else:
            question = check_question(question)
            model, processor = load(folder)
            found = attention.word_attention(model, processor, opened, question, max_new_tokens)
            drawn = attention.draw_words(found, processor, opened)
            about |= {**vars(found), "answer": found.answer.answer, "question": question}
    if output is not None:
        _write(output, drawn.save)
    if as_json:
        typer.echo(json.dumps(about, indent=2, default=lambda array: array.tolist()))
    elif question is not None:
        typer.echo(found.answer.answer)


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
    from omni.looking.layers import inspect_encoder, render

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
def compose(
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="New folder for the checkpoint.")] = None,
    image: Annotated[Path | None, typer.Option(help="Folder of an encoder: CLIP, SigLIP, DINOv2, ViT, ...")] = None,
    thinker: Annotated[Path | None, typer.Option(help="Folder of any causal language model.")] = None,
    projector: Annotated[
        Literal["linear", "mlp", "unshuffle_mlp"], typer.Option(help="From the one to the other.")
    ] = "unshuffle_mlp",
    factor: Annotated[
        int | None, typer.Option(min=1, help="unshuffle_mlp: patches a side.", show_default="2, 3 or 1, what fits")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Join an encoder and a language model that you have: omni compose --image clip --thinker qwen mine."""
    if output is None or image is None or thinker is None:
        _refuse("Expected two folders and a new one, such as `omni compose --image clip --thinker qwen mine`.")
    with _status("starting"):
        from omni.checkpoints.strict import CheckpointError
        from omni.exchange import compose as composition

    _quiet()
    with _mistakes(CheckpointError, ValueError, FileExistsError), _status("joining"):
        composition.expect_new(output)  # before anything large is read
        composed = composition.compose(image, thinker, projector, factor)
        composed.save(output)
    if as_json:
        made = {"checkpoint": str(output), "untrained": composed.model.config.untrained, "notes": composed.notes}
        typer.echo(json.dumps(made, indent=2))
    else:
        typer.echo("\n".join([*composed.notes, f"Wrote {output}"]))
        typer.echo(
            "The projector is untrained, so nobody can ask about pictures yet; train it first: omni train "
            f"configs/train_projector.json --set model.checkpoint={output} --set model.image=null"
        )


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="JSON file, such as configs/train_omni_scenes.json.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value: --set optimizer.lr=0.001")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an earlier run.")] = False,
) -> None:
    """Train what a recipe describes."""
    from omni.training.recipe import Recipe, RecipeError

    with _mistakes(RecipeError):
        read = Recipe.read(recipe, overrides)
    from omni.data.conversations import ExampleError
    from omni.data.sources import ManifestError
    from omni.training.run import last_checkpoint, run
    from omni.training.trainer import CheckpointDamageError, DiskFullError
    from omni.vision.pictures import PictureError

    if resume and last_checkpoint(read) is None:
        typer.echo(f"Nothing to resume in {read.output}, so this is a new run.", err=True)
    mistakes = (FileExistsError, RecipeError, CheckpointDamageError, DiskFullError)
    with _mistakes(*mistakes, ManifestError, PictureError, ExampleError):
        typer.echo(run(read, resume=resume))


@app.command()
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model or of an encoder.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Held-out scenes to ask about.", show_default="500")
    ] = None,
    first: Annotated[int | None, typer.Option(min=0, help="Number of the first scene.", show_default="0")] = None,
    split: Annotated[
        Literal["test", "pairs"] | None,
        typer.Option(help="Scenes; pairs: never-trained shape and colour.", show_default="test"),
    ] = None,
    wordings: Annotated[
        Literal["seen", "held_out"] | None, typer.Option(help="Those of training, or others.", show_default="seen")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Ask only this kind; may be repeated.")] = None,
    data: Annotated[Path | None, typer.Option(help="Ask what this manifest asks, instead of scenes.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="Where paths in it start.", show_default="beside the manifest")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Question of rows with an answer alone.")] = None,
    fit_pictures: Annotated[
        int | None, typer.Option(min=1, help="Encoders: scenes to learn from.", show_default="1500")
    ] = None,
    sight: Annotated[bool, typer.Option("--sight", help="Ask again with the picture blank, swapped, noise.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions at once.", show_default="64")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default="192")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result, as JSON.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every question and answer, as JSONL.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write pictures and answers, mistakes first, as .html.")] = None,
    sheet_pictures: Annotated[int, typer.Option(min=1, help="Most pictures on the sheet.")] = 60,
    card: Annotated[Path | None, typer.Option(help="Put the scores into this model card (README.md).")] = None,
    verify: Annotated[Path | None, typer.Option(help="Measure a written result again and compare.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--checkpoint", help="Same as CHECKPOINT.", show_default="with --verify as it was")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Exact match of answers, with 95 % intervals and the best constant answer; or what an encoder sees."""
    from omni import evaluation
    from omni.checkpoints.strict import CheckpointError
    from omni.data.sources import ManifestError
    from omni.vision.pictures import PictureError

    if checkpoint is not None and folder is not None:
        _refuse("CHECKPOINT and --checkpoint are the same; give one of them.")
    folder = checkpoint or folder
    kinds_of_settings = (evaluation.SceneSettings, evaluation.ManifestSettings, evaluation.EncoderSettings)
    known = {name for each in kinds_of_settings for name in each.model_fields}
    given = {name: value for name, value in context.params.items() if name in known and (value or value == "")}
    given |= {name: str(path) for name, path in (("data", data), ("root", root)) if path is not None}
    if verify is not None and given:
        _refuse("--verify asks what the result says; leave out what else is to be asked.")
    targets = [path.absolute() for path in (output, answers, sheet, card) if path is not None]
    for path in targets:
        if not path.parent.is_dir():
            _refuse(f"{str(path)!r} cannot be written, as its folder does not exist; make it first.")
        if path.is_dir():
            _refuse(f"{str(path)!r} is a folder, expected the name of a file; name one in it.")
        if targets.count(path) > 1:
            _refuse(f"{str(path)!r} would be written twice, and the first lost; give each its own name.")
    if sheet is not None and sheet.suffix != ".html":
        _refuse(f"The sheet is one HTML file, so its name should end with .html, found {str(sheet)!r}.")
    _quiet()
    with _mistakes(CheckpointError, evaluation.EvaluationError, ManifestError, PictureError), _steps() as progress:
        if card is not None:
            evaluation.read_card(card)
        if verify is not None:
            verification = evaluation.verify(evaluation.Result.read(verify), folder, progress)
            outcome = verification.outcome
        elif folder is not None:
            verification = None
            outcome = evaluation.evaluate(folder, evaluation.choose_settings(folder, **given), progress)
        else:
            _refuse("Expected the folder of a checkpoint, or --verify with a result; found neither.")
    if outcome is None:
        typer.echo("Nothing could be measured, so nothing is written.", err=True)
    else:
        finished = outcome
        writers: list[tuple[Path | None, Callable[[Path], None]]] = [
            (output, finished.result.write),
            (answers, lambda path: evaluation.write_answers(path, finished.asked)),
            (sheet, lambda path: evaluation.write_sheet(path, finished, sheet_pictures)),
            (card, lambda path: evaluation.update_card(path, finished.result)),
        ]
        for target, write in writers:
            if target is not None:
                _write(target, write)
    if verification is not None:
        _report(verification, as_json)
    elif outcome is not None:
        if as_json:
            typer.echo(outcome.result.model_dump_json(indent=2))
        else:
            _show(evaluation.render(outcome.result))
        if outcome.result.sight is not None and not outcome.result.sight.passed:
            typer.echo("The sight test failed: without the picture the answers are as good as with it.", err=True)
            raise typer.Exit(1)


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file and say so."""
    existed = path.exists()
    with _mistakes(OSError):
        write(path)
    typer.echo(f"{'Replaced' if existed else 'Wrote'} {path}", err=True)


def _report(verification: Any, as_json: bool) -> None:
    """What came out otherwise than in an earlier result; exit status 1 if anything did."""
    differences, elsewhere = verification.differences, verification.elsewhere
    if as_json:
        found = {"differences": differences, "elsewhere": elsewhere}
        document = {name: [each.model_dump() for each in listed] for name, listed in found.items()}
        typer.echo(json.dumps({"same": not differences, **document}, indent=2))
    else:
        typer.echo("\n".join(map(str, differences)) or "Measured again, all hashes and scores are the same")
        for each in elsewhere:
            typer.echo(f"Not as then, and perhaps why: {each}", err=True)
    if differences:
        raise typer.Exit(1)


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, on a terminal; one for each step, by its name."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(label: str, done: int, total: int) -> None:
            task = tasks[label] if label in tasks else tasks.setdefault(label, bar.add_task(label))
            bar.update(task, completed=done, total=total)

        yield advance


@app.command()
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE", help="Files of micro-Omni or folders of such; with --to a checkpoint's folder."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not be there yet.")],
    to: Annotated[Literal["omni", "micro-omni"], typer.Option(help="Which way.")] = "omni",
    as_json: AsJson = False,
) -> None:
    """Convert micro-Omni's checkpoints to omni's and back: omni convert vision.pt encoder."""
    if to == "micro-omni" and len(sources) > 1:
        _refuse(f"One checkpoint at a time goes to micro-Omni, found {len(sources)}: {', '.join(map(str, sources))}.")
    with _status("starting"):
        from omni.checkpoints.strict import CheckpointError
        from omni.exchange import micro_omni as conversion

    _quiet()
    with _mistakes(conversion.ConversionError, CheckpointError), _status("converting"):
        back = to == "micro-omni"
        done = conversion.to_micro_omni(sources[0], output) if back else conversion.convert(sources, output)
    for note in done.notes:
        typer.echo(f"Note: {note}.", err=True)
    if as_json:
        typer.echo(done.model_dump_json(indent=2))
        return
    typer.echo(f"{done.output}: {done.model}")
    for part, count in done.parameters.items():
        typer.echo(f"  {part}: {count:,} parameters")
    for what, names in (("kept beside it", done.kept), ("left behind", done.left)):
        if names:
            typer.echo(f"  {what}: {', '.join(names)}")


@app.command()
def serve(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model.", show_default=SHIPPED)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network of this machine.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...; auto: an accelerator if there is one.")] = "auto",
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch pictures from this machine and private networks too.")
    ] = False,
) -> None:
    """Serve a checkpoint to OpenAI clients, by `transformers serve`: omni serve checkpoints/omni_tiny."""
    folder = checkpoint or _shipped_checkpoint()
    _quiet()
    try:
        from omni.serving.server import ServingError
        from omni.serving.server import serve as start
    except ImportError as error:
        _refuse(f"Serving needs packages that are not installed ({error}): pip install 'omni-thinker[serve]'.")
    from omni.checkpoints.strict import CheckpointError

    def ready() -> None:
        typer.echo(f"Serving {str(folder)!r} at http://{host}:{port}/v1", err=True)

    with _mistakes(ServingError, CheckpointError):
        start(folder, host, port, device, allow_private, ready)


@app.command("app")
def play(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model.", show_default=SHIPPED)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser.")] = False,
) -> None:
    """Ask on a page in the browser, and see where the model looks: omni app."""
    folder = checkpoint or _shipped_checkpoint()
    _quiet()
    from omni.app.server import AppError
    from omni.app.server import serve as start
    from omni.checkpoints.strict import CheckpointError

    typer.echo(f"Loading {str(folder)!r}; then the page is at http://{host}:{port}, until Ctrl-C", err=True)
    with _mistakes(AppError, CheckpointError):
        start(folder, host, port, browse)


@app.command()
def bench(
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="Of `python -m benchmarks`.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Speed and error of each fast path, no peers.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Whose fast paths.", show_default=SHIPPED)] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="How many are embedded and asked about.", show_default="32")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure omni beside its peers, or its fast paths beside the reference: omni bench --verify."""
    if not verify:
        if checkpoint is not None or pictures is not None or as_json:
            _refuse("--checkpoint, --pictures and --json belong to --verify; add it, or leave them out.")
        root = Path(omni.__file__).parents[1]
        if not (root / "benchmarks" / "__main__.py").is_file():
            _refuse(
                "Peers are measured in a clone of omni's repository, which this is not; `omni bench --verify` works here."
            )
        done = subprocess.run([sys.executable, "-m", "benchmarks", *(jobs or [])], cwd=root, check=False)
        raise typer.Exit(done.returncode)
    if jobs:
        _refuse(f"--verify has no jobs, found {', '.join(jobs)}; leave them out, or leave --verify out.")
    folder = checkpoint or _shipped_checkpoint()
    with _status("starting"):
        from omni.checkpoints.strict import CheckpointError
        from omni.fast.verification import table
        from omni.fast.verification import verify as compare
        from omni.session import QuestionError

    _quiet()
    with _mistakes(CheckpointError, QuestionError), _status("starting") as say:
        found = list(compare(folder, pictures or 32, progress=say))
    if as_json:
        typer.echo(json.dumps([path.model_dump() for path in found], indent=2))
    else:
        _show(table(found))
    if not all(path.within for path in found):
        raise typer.Exit(1)


@app.command("check-data")
def check_data(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of pictures, or a .jsonl, .json or .csv file.")],
    test: Annotated[Path | None, typer.Option(help="Held-out data, which must not show the same pictures.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model: count the tokens too.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Longest row, in tokens.", show_default="as in training")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Where paths start.", show_default="beside the file")] = None,
    prompt: Annotated[str | None, typer.Option(help="Question of rows with an answer alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read all of a data set and report what is wrong with it; the exit status is 1 if anything is."""
    from omni.data.checking import check, first_of_each, render
    from omni.data.manifests import PROMPT, Manifest
    from omni.data.sources import ManifestError

    if max_length is not None and checkpoint is None:
        _refuse("--max-length counts tokens, for which --checkpoint has to name the folder of a model.")
    with _mistakes(ManifestError):
        manifests = {"train": Manifest.read(path, root, PROMPT if prompt is None else prompt)}
        if test is not None:
            manifests["test"] = Manifest.read(test, root, PROMPT if prompt is None else prompt)
    processor = positions = None
    if checkpoint is not None:
        if not (checkpoint / "processor_config.json").is_file():
            _refuse(f"The checkpoint {str(checkpoint)!r} has no processor_config.json; name a fused model's folder.")
        from omni.fusion.configuration_omni import OmniConfig
        from omni.fusion.processing_omni import OmniProcessor

        _quiet()
        with _mistakes(ValueError, OSError):
            processor = OmniProcessor.from_pretrained(checkpoint)
            thinker = OmniConfig.from_pretrained(checkpoint).text_config
        positions = getattr(thinker, "max_position_embeddings", None)
    total = sum(map(len, manifests.values()))
    with _steps() as progress:

        def advance(done: int) -> None:
            progress("reading rows and pictures", done, total)

        report = check(manifests, processor, max_length, positions, progress=advance)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    elif report.problems:
        _show(render(report))
        typer.echo("\n".join(first_of_each(report)))
    else:
        typer.echo(f"{report.rows:,} rows, {report.pictures:,} pictures, nothing found")
    if not report.clean:
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model or of an encoder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to be made.")],
    form: Annotated[Literal["onnx"], typer.Option("--format", help="onnx: for onnxruntime, without torch.")] = "onnx",
    as_json: AsJson = False,
) -> None:
    """Write a model as graphs that run without torch, compared with it: omni export checkpoints/omni_tiny exported."""
    from omni.checkpoints.strict import CheckpointError
    from omni.exchange import onnx as exporting

    _quiet()
    with _mistakes(CheckpointError, exporting.ExportError), _status("tracing, writing and comparing"):
        made = exporting.export(checkpoint, output)
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
    else:
        for graph in made.graphs:
            typer.echo(
                f"{graph.file:<21}{graph.megabytes:>8,.1f} MB   differs from the model by {graph.difference:.1g}"
            )


@contextmanager
def _status(what: str) -> Iterator[Callable[[str], None]]:
    """While something takes long whose length nobody knows: a moving line on stderr, on a terminal, and how to change it."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(what) if console.is_terminal else nullcontext() as status:
        yield status.update if status else lambda text: None


@contextmanager
def _files() -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, on a terminal: how many files, how fast, and how long it will take."""
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


def _shipped_checkpoint(name: str = SHIPPED) -> Path:
    """A checkpoint that comes with omni: in this folder, or in the repository that omni was installed from."""
    for root in (Path(), Path(omni.__file__).parent.parent):
        if (root / name).is_dir():
            return root / name
    _refuse(
        f"The shipped checkpoint {name!r} is neither in this folder nor beside the installed package; run the "
        "command in a clone of the repository, or name a folder with --checkpoint."
    )


def _sides(text: str) -> tuple[int, int]:
    """Height and width from "224" or "320x160"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None:
        raise ValueError(f"An image size looks like 224 or 320x160 (height x width), found {text!r}.")
    return int(sides[1]), int(sides[2] or sides[1])
