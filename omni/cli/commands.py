"""The typer application. Each group of commands adds itself to it."""

from typing import Annotated

import typer

import omni

app = typer.Typer(
    help="Ask about pictures, embed them, look into models, and train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a plain traceback is the best report of a bug
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
