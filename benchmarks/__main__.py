"""The command `python -m benchmarks`: runs jobs, prints a table for each race and, as the last line, one JSON document."""

import datetime
import json
import os
import sys
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched from anywhere

from benchmarks import machine, measure, report

JOBS = ("encoder", "training", "files", "second_question", "generation", "projectors", "imports", "loading")

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    jobs: Annotated[
        list[str] | None, typer.Argument(metavar="[JOB]...", help=", ".join(JOBS), show_default="all")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="How often each contestant is measured.", show_default="15, or 3 if quick")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small inputs, nothing compiled: does it run?")] = False,
) -> None:
    """Measure omni beside its peers. The last line of output is one JSON document.

    Exit status 1: some contestant did not run for a reason that nobody expected.
    """
    if unknown := sorted({*(jobs or ())} - {*JOBS}):
        typer.echo(f"Error: no job {', '.join(map(repr, unknown))}; there are {', '.join(JOBS)}.", err=True)
        raise typer.Exit(2)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Console(width=None if sys.stdout.isatty() else 160)
    aside = Console(stderr=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        aside.print(f"Something else is running here (load {load:.1f}); the figures will not mean much.")
    rounds = rounds or (3 if quick else 15)
    outcomes: dict[str, list[measure.Outcome]] = {}
    for job in jobs or JOBS:
        for race in import_module(f"benchmarks.jobs.{job}").races(quick):
            with aside.status(f"{job}: {race.title}"):
                outcomes.setdefault(job, []).append(outcome := measure.run(race, rounds))
            out.print(report.table(job, outcome), "")
    document = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine.commit(),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        "load_before": load,
        "rounds": rounds,
        "quick": quick,
        "jobs": {job: [report.document(outcome) for outcome in run] for job, run in outcomes.items()},
    }
    typer.echo(json.dumps(document))
    if not all(result.expected for run in outcomes.values() for outcome in run for result in outcome.results):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
