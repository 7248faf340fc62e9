"""The commands that ask about files and show where a model looks: ask, attend."""

import json
import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from omni.cli.commands import app
from omni.cli.console import (
    SHIPPED,
    AsJson,
    Dtype,
    expect_checkpoint,
    expect_place,
    quiet_transformers,
    refuse,
    shipped_checkpoint,
    shipped_encoder,
    status,
    user_errors,
    write_file,
)
from omni.files import write_whole


@app.command()
def ask(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="Files of any modality: pictures, sounds.")
    ] = None,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            help="The question, in quotes. By default the one that the model was trained on, or one that a file asks.",
        ),
    ] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model.", show_default=SHIPPED)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    dtype: Dtype = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 where a file or the question is unlike training.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Ask about one or more files: omni ask photo.jpg "what color is the circle?"."""
    folder = checkpoint or shipped_checkpoint()
    files, asking = files or [], list[str]()
    if _names_a_file(question):
        files = [*files, question]
        question, asking = _unasked(folder, question)
    if not files:
        refuse(f"Expected files and then a question in quotes, found only {question!r}; name a file.")
    items = _read(folder, files, asking)
    if strict:
        _expect_familiarity(folder, {item.modality for item in items})
    start = time.perf_counter()
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError
        from omni.loading.checkpoint import load
        from omni.questions import QuestionError, check_question
        from omni.session import answer

    quiet_transformers()
    with user_errors(CheckpointError, QuestionError), status("loading") as say:
        question = check_question(question, in_words=not asking)
        model, processor = load(folder, dtype)
        loaded = time.perf_counter()
        say("answering")
        result = answer(model, processor, items, question, max_new_tokens)
    if as_json:
        seconds = {"loading": round(loaded - start, 3), **result.seconds}
        typer.echo(result.model_copy(update={"seconds": seconds}).model_dump_json(indent=2))
    else:
        typer.echo(result.answer)
    if not result.complete:
        typer.echo(f"The answer was cut after {max_new_tokens} tokens; raise --max-new-tokens for the rest.", err=True)
    elif not result.answer:
        typer.echo("The model's answer is empty.", err=True)
    if result.familiar is not None and (note := result.familiar.note([item.modality for item in items])):
        typer.echo(f"{note} Its answer may mean nothing.", err=True)
        if strict:
            raise typer.Exit(3)


def _expect_png(output: Path) -> None:
    """Refuse a name under which no map can be written."""
    if output.suffix.lower() != ".png":
        refuse(f"Expected a file name that ends with .png, found {str(output)!r}; maps are written as PNG.")
    expect_place(output)


@app.command()
def attend(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE", help="A picture, a sound; with a question, one or more.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Show where the Thinker looks for each word of its answer."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the drawn maps, .png.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a fused model, or of an encoder.",
            show_default=f"{SHIPPED}, or the shipped encoder of the file",
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Layer of the encoder.", show_default="the last")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    as_json: AsJson = False,
) -> None:
    """Show where an encoder looks, or with a question, the Thinker: omni attend photo.jpg --output map.png."""
    from omni.items import can_be_shown, read_items
    from omni.registry import get_modality

    asking = list[str]()
    if question is None:
        refuse("Expected a file, and after it a question in quotes if you have one; found nothing.")
    if not files:
        files, question = [question], None
    elif _names_a_file(question):
        files = [*files, question]
        question, asking = _unasked(checkpoint or shipped_checkpoint(), question)
    if question is not None and layer is not None:
        refuse("--layer names a layer of the encoder, and a question shows the Thinker; leave one of them out.")
    if output is not None:
        _expect_png(output)
    elif not as_json:
        refuse("Expected a file for the maps, found none; add --output map.png, or --json for the numbers.")
    if question is None:
        with user_errors(ValueError):
            items = read_items(files)
        folder = checkpoint or shipped_encoder(items[0].modality)
        expect_checkpoint(folder)
    else:
        folder = checkpoint or shipped_checkpoint()
        items = _read(folder, files, asking)
    named: dict[str, list[str]] = {}  # the files of each modality, as messages call them
    for file, item in zip(files, items, strict=True):
        named.setdefault(f"{get_modality(item.modality).noun}s", []).append(file)
    hidden = list(dict.fromkeys(get_modality(item.modality).noun for item in items if not can_be_shown(item)))
    unseen = f"A {' or a '.join(hidden)} cannot be drawn, as its plug-in does not show it"
    if output is not None and not any(map(can_be_shown, items)):
        refuse(f"{unseen}; leave out --output, and read the numbers with --json.")
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError
        from omni.loading.checkpoint import load
        from omni.loading.encoder import load_encoder
        from omni.looking import attention, panels
        from omni.questions import QuestionError, check_question

    quiet_transformers()
    about: dict[str, Any] = {**named, "checkpoint": str(folder)}
    drawn: Any = None
    with user_errors(CheckpointError, QuestionError, attention.AttentionError), status("looking"):
        if question is None:
            encoder = load_encoder(folder, items[0].modality)
            looks = attention.encoder_attention(encoder, items[0].value, layer)
            if output is not None:
                drawn = panels.draw_encoder(looks, encoder, items[0].value)
            about |= {**vars(looks), "mean": looks.mean}
        else:
            question = check_question(question, in_words=not asking)
            model, processor = load(folder)
            found = attention.word_attention(model, processor, items, question, max_new_tokens)
            if output is not None:
                drawn = panels.draw_words(found, processor, items)
            about |= {**vars(found), "answer": found.answer.answer, "question": question}
    if output is not None:
        write_file(output, lambda path: write_whole(path, lambda file: drawn.save(file, "PNG")))
        if hidden:
            typer.echo(f"{unseen}; --json prints the numbers.", err=True)
    if as_json:
        typer.echo(json.dumps(about, indent=2, default=lambda array: array.tolist()))
    elif question is not None:
        typer.echo(found.answer.answer)


def _expect_familiarity(folder: Path, modalities: set[str]) -> None:
    """Refuse `--strict` for a checkpoint that does not say what it was trained on, in each of these modalities."""
    from omni.checkpoints.folder import FAMILIARITY, CheckpointError, read_object

    known: Any = {}
    if os.path.exists(folder / FAMILIARITY):
        with user_errors(CheckpointError):
            known = read_object(folder / FAMILIARITY).get("items", {})
    if unknown := sorted(modalities - {*known}):
        refuse(
            f"{str(folder)!r} does not say what the model was trained on (modality {' and '.join(map(repr, unknown))}), so "
            "--strict has nothing to compare with; run `omni checkpoint familiarise`, or leave --strict out."
        )


def _names_a_file(question: str) -> bool:
    """Whether the question is the name of a file."""
    from omni.items import suffixes

    return os.path.isfile(question) or (not re.search(r"\s", question) and question.lower().endswith(suffixes()))


def _unasked(folder: Path, last: str) -> tuple[str, list[str]]:
    """The default question of a model, and the modalities of the items that can ask in place of words."""
    from omni.checkpoints.folder import CheckpointError, asked_by, prompt_of

    with user_errors(CheckpointError):
        trained = prompt_of(folder)
        asking = [] if trained else asked_by(folder)
    if not trained and not asking:
        refuse(f"Expected a question in quotes after the files, found the file {last!r}; add the question.")
    return trained or "", asking


def _read(folder: Path, files: list[str], asking: list[str]) -> list[Any]:
    """The items in the files, if the model in the folder answers questions about such items."""
    from omni.checkpoints.folder import expect_answers, modalities_of
    from omni.items import expect_known, read_items
    from omni.registry import get_modality

    with user_errors(ValueError):
        expect_answers(folder)
        items, known = read_items(files), modalities_of(folder)
        if known is not None:
            expect_known(items, known)
        if lacking := [get_modality(name).noun for name in asking if name not in {item.modality for item in items}]:
            refuse(
                f"Expected a question in quotes after the files, or a {' and a '.join(lacking)} that asks, found the file "
                f"{files[-1]!r}; add one of them."
            )
    return items
