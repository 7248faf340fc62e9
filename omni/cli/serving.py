"""The commands that let others ask: serve, an OpenAI server, and app, a page."""

from pathlib import Path
from typing import Annotated

import typer

from omni.cli.commands import app
from omni.cli.console import (
    SHIPPED,
    Dtype,
    expect_checkpoint,
    quiet_transformers,
    refuse,
    shipped_checkpoint,
    user_errors,
)


@app.command()
def serve(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model.", show_default=SHIPPED)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network of this machine.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="cpu, cuda:0, ...; auto: an accelerator if there is one.")] = "auto",
    dtype: Dtype = "auto",
    name: Annotated[
        str | None,
        typer.Option("--served-model-name", help="What clients call the model.", show_default="the folder's name"),
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A further name by which clients call this machine; may be repeated.")
    ] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="Fetch files from this machine and private networks too.")
    ] = False,
) -> None:
    """Serve a checkpoint to OpenAI clients: omni serve checkpoints/omni_tiny."""
    folder = checkpoint or shipped_checkpoint()
    expect_checkpoint(folder)
    quiet_transformers()
    try:
        from omni.serving.server import ServingError
        from omni.serving.server import serve as start
    except ImportError as error:
        refuse(f"Serving needs packages that are not installed ({error}): pip install 'omni-thinker[serve]'.")
    from omni.checkpoints.folder import CheckpointError

    def ready() -> None:
        typer.echo(f"Serving {str(folder)!r} at http://{host}:{port}/v1", err=True)

    with user_errors(ServingError, CheckpointError):
        start(folder, host, port, device, allow_private, ready, name, allowed_host or (), dtype)


@app.command("app")
def play(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model.", show_default=SHIPPED)
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    dtype: Dtype = "auto",
    browse: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser.")] = False,
) -> None:
    """Ask on a page in the browser, and see where the model looks: omni app."""
    folder = checkpoint or shipped_checkpoint()
    expect_checkpoint(folder)
    quiet_transformers()
    from omni.app.server import AppError
    from omni.app.server import serve as start
    from omni.checkpoints.folder import CheckpointError

    def listening(where: str) -> None:
        typer.echo(f"Loading {str(folder)!r}; then the page is {where}; Ctrl-C ends it", err=True)

    with user_errors(AppError, CheckpointError):
        start(folder, host, port, browse, listening, dtype)
