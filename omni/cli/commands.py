"""The application that every group of commands adds itself to."""

from typing import Annotated

import typer

import omni

app = typer.Typer(
    help="Ask about pictures, embed them, look into models, and train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug is reported best with the plain traceback that everybody knows
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
