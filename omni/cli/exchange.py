"""The commands by which models come in and go out: compose, convert, export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import AsJson, expect_checkpoint, quiet_transformers, refuse, status, user_errors, with_encoders


def _by_name(values: list[str] | None, kinds: str, read: Callable[[str], Any]) -> Any:
    """Parse `mlp`, for all modalities, or `image=mlp`, for one; None if nothing is given."""
    split = [value.rpartition("=") for value in values or []]
    try:
        read_values = [(name, read(value)) for name, _, value in split]
    except ValueError:
        refuse(f"Expected {kinds}, or NAME={kinds} for one modality, found {' '.join(values or [])!r}.")
    if len(split) > 1 and not all(name for name, _ in read_values):
        refuse(f"Expected {kinds} once, or NAME={kinds} for each modality, found {' '.join(values or [])!r}.")
    return dict(read_values) if read_values and read_values[0][0] else read_values[0][1] if read_values else None


def _factor(text: str) -> int:
    if (factor := int(text)) < 1:
        raise ValueError(text)
    return factor


@app.command()
@with_encoders
def compose(
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="New folder for the checkpoint.")] = None,
    thinker: Annotated[Path | None, typer.Option(help="Folder of any causal language model.")] = None,
    projector: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]KIND", help="linear, mlp or unshuffle_mlp.", show_default="unshuffle_mlp"),
    ] = None,
    factor: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]K", help="unshuffle_mlp: patches a side.", show_default="2, 3 or 1, as it fits"),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="Write the projector alone, and where the parts are; they have to stay there."),
    ] = False,
    as_json: AsJson = False,
    **encoders: Path | None,
) -> None:
    """Compose a model of encoders and a language model that you have: omni compose --image clip --thinker qwen mine."""
    folders = {name: folder for name, folder in encoders.items() if folder is not None}
    if output is None or not folders or thinker is None:
        refuse("Expected two folders and a new one, such as `omni compose --image clip --thinker qwen mine`.")
    for folder in (*folders.values(), thinker):
        expect_checkpoint(folder)
    kinds = _by_name(projector, "KIND", str) or "unshuffle_mlp"
    factors = _by_name(factor, "a whole number from 1 on", _factor)
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError, expect_new
        from omni.exchange import compose as composition
        from omni.registry import get_modality

    quiet_transformers()
    with user_errors(CheckpointError, ValueError, FileExistsError), status("joining"):
        expect_new(output)  # before anything large is read
        composed = composition.compose(folders, thinker, kinds, factors)
        composed.save(output, apart)
    if as_json:
        made = {"checkpoint": str(output), "untrained": composed.model.config.untrained, "notes": composed.notes}
        typer.echo(json.dumps(made, indent=2))
        return
    typer.echo("\n".join([*composed.notes, f"Wrote {output}"]))
    nouns = " and ".join(f"{get_modality(name).noun}s" for name in folders)
    several = len(folders) > 1
    kept = " ".join(f"--set model.{name}=null" for name in folders)
    typer.echo(
        f"The projector{'s are' if several else ' is'} untrained, so the model refuses questions about {nouns}; train "
        f"{'them' if several else 'it'} first: omni train configs/train_projector.json --set model.checkpoint={output} "
        + kept
    )


@app.command()
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="micro-Omni's files, or folders of them; a .gguf file; with --to micro-omni, a checkpoint.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    to: Annotated[Literal["omni", "micro-omni"], typer.Option(help="Direction.")] = "omni",
    as_json: AsJson = False,
) -> None:
    """Convert checkpoints of micro-Omni to omni's, or back: omni convert vision.pt encoder.

    A language model in a GGUF file becomes a folder that compose takes: omni convert model.gguf model.
    """
    if sources[0].suffix == ".gguf":
        _unpack(sources, output, as_json)
        return
    for source in sources:
        if not source.exists():
            refuse(f"{str(source)!r} does not exist; name files of micro-Omni, such as vision.pt.")
    if to == "micro-omni" and len(sources) > 1:
        refuse(f"Expected one checkpoint for --to micro-omni, found {len(sources)}: {', '.join(map(str, sources))}.")
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError
        from omni.exchange import micro_omni

    quiet_transformers()
    with user_errors(micro_omni.ConversionError, CheckpointError), status("converting"):
        back = to == "micro-omni"
        done = micro_omni.to_micro_omni(sources[0], output) if back else micro_omni.convert(sources, output)
    for note in done.notes:
        typer.echo(f"Note: {note}.", err=True)
    if as_json:
        typer.echo(done.model_dump_json(indent=2))
        return
    typer.echo(f"{done.output}: {done.model}")
    for part, count in done.parameters.items():
        typer.echo(f"  {part}: {count:,} parameters")
    for what, names in (("kept beside it", done.kept), ("left behind", done.left)):
        if names:
            typer.echo(f"  {what}: {', '.join(names)}")


def _unpack(sources: list[Path], output: Path, as_json: bool) -> None:
    if len(sources) > 1:
        refuse(f"Expected one GGUF file, found {len(sources)} sources; convert them one by one.")
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError
        from omni.exchange.gguf import unpack
    quiet_transformers()
    with user_errors(CheckpointError, FileExistsError), status("converting"):
        unpack(sources[0], output)
    typer.echo(json.dumps({"output": str(output)}, indent=2) if as_json else f"Wrote {output}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model or of an encoder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the graphs.")],
    form: Annotated[Literal["onnx"], typer.Option("--format", help="onnx: runs in onnxruntime.")] = "onnx",
    as_json: AsJson = False,
) -> None:
    """Write a model as graphs that run without torch: omni export checkpoints/omni_tiny exported."""
    from omni.checkpoints.folder import CheckpointError, expect_new

    expect_checkpoint(checkpoint)
    with user_errors(FileExistsError):
        expect_new(output)
    from omni.exchange import onnx as exporting

    quiet_transformers()
    with user_errors(CheckpointError, exporting.ExportError), status("tracing, writing and comparing"):
        made = exporting.export(checkpoint, output)
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
    else:
        for graph in made.graphs:
            typer.echo(
                f"{graph.file:<21}{graph.megabytes:>8,.1f} MB   differs from the model by {graph.difference:.1g}"
            )
