"""Ask about items, and see where a model looks for its answer."""

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
    SHIPPED_ENCODER,
    AsJson,
    quiet_transformers,
    refuse,
    shipped_checkpoint,
    status,
    user_errors,
    write_file,
)


@app.command()
def ask(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="JPEG, PNG, WebP, GIF, BMP or TIFF files.")
    ] = None,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION", help="What to ask, in quotes; a model that was trained with one has a default."
        ),
    ] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model.", show_default=SHIPPED)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    as_json: AsJson = False,
) -> None:
    """Ask about one or more pictures: omni ask photo.jpg "what color is the circle?"."""
    from omni.registry import ItemError, open_item

    folder = checkpoint or shipped_checkpoint()
    if _names_a_picture(question):
        from omni.checkpoints.strict import CheckpointError
        from omni.loading.checkpoint import prompt_of

        with user_errors(CheckpointError):
            trained = prompt_of(folder)
        if trained is not None:
            pictures, question = [*(pictures or []), question], trained
        elif pictures:
            refuse(f"Expected a question in quotes after the pictures, found the file {question!r}; add the question.")
    if not pictures:
        refuse(f"Expected picture files and after them a question in quotes, found only {question!r}.")
    with user_errors(ItemError):
        opened = [open_item("image")(path) for path in pictures]
    start = time.perf_counter()
    with status("starting"):
        from omni.checkpoints.strict import CheckpointError
        from omni.loading.checkpoint import load
        from omni.session import QuestionError, answer, check_question

    quiet_transformers()
    with user_errors(CheckpointError, QuestionError), status("loading") as say:
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
    from omni.registry import ItemError, open_item

    if question is None:
        refuse("Expected a picture file, and after it a question in quotes if there is one; found nothing.")
    if not pictures:
        pictures, question = [question], None
    elif _names_a_picture(question):
        refuse(f"Expected a question after several pictures, found the file {question!r}; ask, or pass one picture.")
    if question is not None and layer is not None:
        refuse("--layer is one of the encoder, and a question is about the Thinker; leave one of them out.")
    if output is None and not as_json:
        refuse("Nothing would be left of it; name a picture to write with --output map.png, or add --json.")
    if output is not None and output.suffix.lower() != ".png":
        refuse(f"The maps are written as PNG, so the file's name should end with .png, found {str(output)!r}.")
    if output is not None and not output.absolute().parent.is_dir():
        refuse(f"{str(output)!r} cannot be written, as its folder does not exist; make it first.")
    with user_errors(ItemError):
        opened = [open_item("image")(path) for path in pictures]
    folder = checkpoint or shipped_checkpoint(SHIPPED_ENCODER if question is None else SHIPPED)
    with status("starting"):
        from omni.checkpoints.strict import CheckpointError
        from omni.loading.checkpoint import load, model_type_of
        from omni.loading.encoder import load_encoder
        from omni.looking import attention, panels
        from omni.session import QuestionError, check_question

    quiet_transformers()
    about: dict[str, Any] = {"pictures": pictures, "checkpoint": str(folder)}
    with user_errors(CheckpointError, QuestionError, attention.AttentionError), status("looking"):
        if question is None:
            model_type_of(folder)  # or there is none
            encoder = load_encoder(folder)
            looks = attention.encoder_attention(encoder, opened[0], layer)
            drawn = panels.draw_encoder(looks, encoder, opened[0])
            about |= {**vars(looks), "mean": looks.mean}
        else:
            question = check_question(question)
            model, processor = load(folder)
            found = attention.word_attention(model, processor, opened, question, max_new_tokens)
            drawn = panels.draw_words(found, processor, opened)
            about |= {**vars(found), "answer": found.answer.answer, "question": question}
    if output is not None:
        write_file(output, drawn.save)
    if as_json:
        typer.echo(json.dumps(about, indent=2, default=lambda array: array.tolist()))
    elif question is not None:
        typer.echo(found.answer.answer)


def _names_a_picture(question: str) -> bool:
    """Whether a file stands where a question should."""
    return os.path.isfile(question) or bool(
        re.fullmatch(r"\S+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?)", question, re.IGNORECASE)
    )
