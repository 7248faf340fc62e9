"""The command `python -m benchmarks`. It runs jobs, prints a table for each race, and one JSON document as the last line."""

import datetime
import json
import os
import sys
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded

from benchmarks import machine, measure, tables

JOBS = (
    "encoder",
    "training",
    "teaching",
    "files",
    "sounds",
    "second_question",
    "generation",
    "projectors",
    "imports",
    "loading",
    "rows",
    "pieces",
)
ON_GPU = ("encoder", "training", "generation")
"""Jobs that also run on a GPU."""

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB]...", help=", ".join(JOBS), show_default="all")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Measurements of each contestant.", show_default="15, or 3 if quick")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small inputs, nothing compiled: does it run?")] = False,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda|cuda:N", help=f"A GPU runs the jobs {', '.join(ON_GPU)}.")
    ] = "cpu",
) -> None:
    """Measure omni beside its peers. The last line of output is one JSON document.

    The exit status is 1 if a contestant fails for an unexpected reason.
    """
    if unknown := sorted({*(jobs or ())} - {*JOBS}):
        raise _user_error(f"Unknown job {', '.join(map(repr, unknown))}; known: {', '.join(JOBS)}.")
    try:
        where = machine.device(device)
    except ValueError as error:
        raise _user_error(str(error)) from error
    possible = JOBS if where.type == "cpu" else ON_GPU
    if unable := sorted({*(jobs or ())} - {*possible}):
        raise _user_error(
            f"expected jobs that run on {device!r} ({', '.join(possible)}), found {', '.join(map(repr, unable))}; leave "
            "them out, or measure them on the CPU."
        )
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Console(width=None if sys.stdout.isatty() else 160)
    aside = Console(stderr=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        aside.print(f"Other programs are running on this machine (load {load:.1f}), so the figures will mean little.")
    rounds = rounds or (3 if quick else 15)
    outcomes: dict[str, list[measure.Outcome]] = {}
    for job in jobs or possible:
        races = import_module(f"benchmarks.jobs.{job}").races
        for race in races(quick, where) if job in ON_GPU else races(quick):
            with aside.status(f"{job}: {race.title}"):
                outcomes.setdefault(job, []).append(outcome := measure.run(race, rounds, machine.clock(where)))
            out.print(tables.table(job, outcome), "")
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine.commit(),
        "hardware": machine.hardware(where),
        "versions": machine.versions(),
        "load_before": load,
        "rounds": rounds,
        "quick": quick,
        "jobs": {job: [tables.document(outcome) for outcome in run] for job, run in outcomes.items()},
    }
    typer.echo(json.dumps(document))
    if not all(result.expected for run in outcomes.values() for outcome in run for result in outcome.results):
        raise typer.Exit(1)


def _user_error(message: str) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
