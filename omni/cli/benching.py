"""The command that measures speed, bench: omni beside its peers, or its fast paths beside the reference."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

import omni
from omni.cli.commands import app
from omni.cli.console import SHIPPED, AsJson, quiet_transformers, refuse, shipped_checkpoint, show, status, user_errors


@app.command()
def bench(
    jobs: Annotated[list[str] | None, typer.Argument(metavar="[JOB]...", help="As in `python -m benchmarks`.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Speed and error of each fast path; no peers.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a fused model.", show_default=SHIPPED)] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Pictures to embed and to ask about.", show_default="32")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure omni beside its peers, or its fast paths beside the reference: omni bench --verify."""
    if not verify:
        if checkpoint is not None or pictures is not None or as_json:
            refuse("--checkpoint, --pictures and --json need --verify; add it, or leave them out.")
        root = Path(omni.__file__).parents[1]
        if not (root / "benchmarks" / "__main__.py").is_file():
            refuse(
                "Peers can only be measured in a clone of omni's repository, which this is not; `omni bench --verify` works "
                "here."
            )
        done = subprocess.run([sys.executable, "-m", "benchmarks", *(jobs or [])], cwd=root, check=False)
        raise typer.Exit(done.returncode)
    if jobs:
        refuse(f"--verify takes no jobs, found {', '.join(jobs)}; leave them out, or leave --verify out.")
    if find_spec("omni.fast") is None:
        refuse("The fast paths come from omni.fast, which is not installed; install it, or there is nothing to verify.")
    folder = checkpoint or shipped_checkpoint()
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError
        from omni.fast.comparison import compare, table
        from omni.questions import QuestionError
        from omni.worlds import WorldError

    quiet_transformers()
    with user_errors(CheckpointError, QuestionError, WorldError), status("starting") as say:
        found = list(compare(folder, pictures or 32, progress=say))
    if as_json:
        typer.echo(json.dumps([path.model_dump() for path in found], indent=2))
    else:
        show(table(found))
    if not all(path.within for path in found):
        raise typer.Exit(1)
