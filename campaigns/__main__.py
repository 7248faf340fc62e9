"""The command `python -m campaigns NAME`: runs campaigns and prints a table of their results.

The exit status is 1 if there are failures.
"""

import time
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import campaigns

NAMES = sorted(
    module.name for module in iter_modules(campaigns.__path__) if module.name not in ("__main__", "damage", "tally")
)

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help=", ".join(NAMES), show_default="all")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Inputs of each campaign.")] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed makes the same inputs.")] = 0,
    seconds: Annotated[float, typer.Option(min=0, help="The longest that a campaign runs.")] = 600,
) -> None:
    """Search for inputs that omni gets wrong."""
    if unknown := sorted({*(names or ())} - {*NAMES}):
        typer.echo(f"Error: no campaign {', '.join(map(repr, unknown))}; there are {', '.join(NAMES)}.", err=True)
        raise typer.Exit(2)
    table = Table("campaign", *("tried", "refused", "unchanged", "failures", "seconds"))
    wrong: list[str] = []
    for name in names or NAMES:
        start = time.monotonic()
        tally = import_module(f"campaigns.{name}").run(seed, count, seconds)
        figures = tally.tried, tally.refused, tally.unchanged, len(tally.failures)
        table.add_row(name, *(f"{figure:,}" for figure in figures), f"{time.monotonic() - start:.0f}")
        wrong += tally.failures
    Console().print(table)
    for line in wrong:
        Console(soft_wrap=True).print(escape(line))
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    app(prog_name="python -m campaigns")
