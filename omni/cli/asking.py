"""The commands that ask about pictures and show where a model looks: ask, attend."""

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
from omni.files import write_whole


@app.command()
def ask(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="JPEG, PNG, WebP, GIF, BMP or TIFF files.")
    ] = None,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION", help="The question, in quotes. By default the one that the model was trained on."
        ),
    ] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model.", show_default=SHIPPED)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    as_json: AsJson = False,
) -> None:
    """Ask about one or more pictures: omni ask photo.jpg "what color is the circle?"."""
    from omni.registry import ItemError, open_item

    folder = checkpoint or shipped_checkpoint()
    from omni.checkpoints.folder import CheckpointError, expect_answers, prompt_of

    if _names_a_picture(question):
        with user_errors(CheckpointError):
            trained = prompt_of(folder)
        if trained is not None:
            pictures, question = [*(pictures or []), question], trained
        elif pictures:
            refuse(f"Expected a question in quotes after the pictures, found the file {question!r}; add the question.")
    if not pictures:
        refuse(f"Expected picture files and then a question in quotes, found only {question!r}; name a picture.")
    with user_errors(CheckpointError):  # before anything that takes seconds
        expect_answers(folder)
    with user_errors(ItemError):
        opened = [open_item("image")(path) for path in pictures]
    start = time.perf_counter()
    with status("starting"):
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
        typer.echo("The model's answer is empty.", err=True)


@app.command()
def attend(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="A picture file; with a question, one or more.")
    ] = None,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="Show where the Thinker looks for each word of its answer."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File for the drawn maps, .png.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Folder of a fused model, or of an encoder.", show_default=f"{SHIPPED}, {SHIPPED_ENCODER}"),
    ] = None,
    layer: Annotated[int | None, typer.Option(min=1, help="Layer of the encoder.", show_default="the last")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 192,
    as_json: AsJson = False,
) -> None:
    """Show where an encoder looks, or with a question, the Thinker: omni attend photo.jpg --output map.png."""
    from omni.registry import ItemError, open_item

    if question is None:
        refuse("Expected a picture file, and after it a question in quotes if you have one; found nothing.")
    if not pictures:
        pictures, question = [question], None
    elif _names_a_picture(question):
        refuse(
            f"Expected a question in quotes after several pictures, found the file {question!r}; add the question, or pass "
            "one picture."
        )
    if question is not None and layer is not None:
        refuse("--layer names a layer of the encoder, and a question shows the Thinker; leave one of them out.")
    if output is None and not as_json:
        refuse("Expected a file for the maps, found none; add --output map.png, or --json for the numbers.")
    if output is not None and output.suffix.lower() != ".png":
        refuse(f"Expected a file name that ends with .png, found {str(output)!r}; maps are written as PNG.")
    if output is not None and not output.absolute().parent.is_dir():
        refuse(f"{str(output)!r} cannot be written, because its folder does not exist; make it first.")
    with user_errors(ItemError):
        opened = [open_item("image")(path) for path in pictures]
    folder = checkpoint or shipped_checkpoint(SHIPPED_ENCODER if question is None else SHIPPED)
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError, model_type_of
        from omni.loading.checkpoint import load
        from omni.loading.encoder import load_encoder
        from omni.looking import attention, panels
        from omni.session import QuestionError, check_question

    quiet_transformers()
    about: dict[str, Any] = {"pictures": pictures, "checkpoint": str(folder)}
    with user_errors(CheckpointError, QuestionError, attention.AttentionError), status("looking"):
        if question is None:
            model_type_of(folder)  # refuses a folder without a checkpoint
            encoder = load_encoder(folder, "image")
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
        write_file(output, lambda path: write_whole(path, lambda file: drawn.save(file, "PNG")))
    if as_json:
        typer.echo(json.dumps(about, indent=2, default=lambda array: array.tolist()))
    elif question is not None:
        typer.echo(found.answer.answer)


def _names_a_picture(question: str) -> bool:
    """Whether the question is the name of a file."""
    return os.path.isfile(question) or bool(
        re.fullmatch(r"\S+\.(jpe?g|jfif|png|webp|gif|bmp|tiff?)", question, re.IGNORECASE)
    )
