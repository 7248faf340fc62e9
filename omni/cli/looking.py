"""The commands that look inside: inspect an encoder, and list the registered modalities."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

import omni
from omni.cli.commands import app
from omni.cli.console import AsJson, expect_checkpoint, quiet_transformers, refuse, show, user_errors


@app.command()
def inspect(
    encoder: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder or JSON configuration.")],
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="What the encoder reads, such as a picture or a sound.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: a side, or HEIGHTxWIDTH.", show_default="its own")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items at once.")] = 1,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels of parts to show.", show_default="all")] = None,
    as_json: AsJson = False,
) -> None:
    """List the layers of an encoder, with the shape, parameters, FLOPs and memory of each."""
    if not encoder.exists():
        refuse(f"{str(encoder)!r} does not exist; expected a checkpoint folder or a JSON configuration.")
    if encoder.is_dir():
        expect_checkpoint(encoder)
    from omni.looking.layers import inspect_encoder, render

    quiet_transformers()
    with user_errors(ValueError):
        found = inspect_encoder(encoder, _sides(image_size) if image_size else None, batch, file)
    if depth is not None:
        found = found.model_copy(update={"rows": tuple(row for row in found.rows if row.depth <= depth)})
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        show(render(found))


@app.command()
def modalities(as_json: AsJson = False) -> None:
    """List the registered modalities, and the package that each comes from."""
    with user_errors(ValueError):
        origins = omni.modalities()
    if as_json:
        typer.echo(json.dumps(origins, indent=2))
    else:
        width = max(map(len, origins))
        typer.echo("\n".join(f"{name:<{width}}  {origin}" for name, origin in origins.items()))


def _sides(text: str) -> tuple[int, int]:
    """Height and width from "224" or "320x160"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if sides is None:
        raise ValueError(f"Expected an image size such as 224 or 320x160 (height x width), found {text!r}.")
    height, width = sides[1], sides[2] or sides[1]
    if max(len(height), len(width)) > 5:
        raise ValueError(f"Expected sides of at most 99,999 pixels, found {text[:40]!r}; name a smaller size.")
    return int(height), int(width)
