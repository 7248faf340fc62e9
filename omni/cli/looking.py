"""Look into an encoder, and list what is registered."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

import omni
from omni.cli.commands import app
from omni.cli.console import AsJson, show, user_errors


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

    with user_errors(ValueError):
        report = inspect_encoder(encoder, _sides(image_size) if image_size else None, batch)
    if depth is not None:
        report = report.model_copy(update={"rows": tuple(row for row in report.rows if row.depth <= depth)})
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        show(render(report))


@app.command()
def modalities(as_json: AsJson = False) -> None:
    """List the registered modalities and where each comes from."""
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
        raise ValueError(f"An image size looks like 224 or 320x160 (height x width), found {text!r}.")
    return int(sides[1]), int(sides[2] or sides[1])
