"""The commands by which models come in and go out: compose, convert, export."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import AsJson, quiet_transformers, refuse, status, user_errors


@app.command()
def compose(
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="New folder for the checkpoint.")] = None,
    image: Annotated[Path | None, typer.Option(help="Folder of an encoder: CLIP, SigLIP, DINOv2, ViT, ...")] = None,
    thinker: Annotated[Path | None, typer.Option(help="Folder of any causal language model.")] = None,
    projector: Annotated[
        Literal["linear", "mlp", "unshuffle_mlp"], typer.Option(help="Kind of the new projector.")
    ] = "unshuffle_mlp",
    factor: Annotated[
        int | None, typer.Option(min=1, help="unshuffle_mlp: patches a side.", show_default="2, 3 or 1, as it fits")
    ] = None,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="Write the projector alone, and where the parts are; they have to stay there."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compose a model of an encoder and a language model that you have: omni compose --image clip --thinker qwen mine."""
    if output is None or image is None or thinker is None:
        refuse("Expected two folders and a new one, such as `omni compose --image clip --thinker qwen mine`.")
    with status("starting"):
        from omni.checkpoints.folder import CheckpointError, expect_new
        from omni.exchange import compose as composition

    quiet_transformers()
    with user_errors(CheckpointError, ValueError, FileExistsError), status("joining"):
        expect_new(output)  # before anything large is read
        composed = composition.compose(image, thinker, projector, factor)
        composed.save(output, apart)
    if as_json:
        made = {"checkpoint": str(output), "untrained": composed.model.config.untrained, "notes": composed.notes}
        typer.echo(json.dumps(made, indent=2))
    else:
        typer.echo("\n".join([*composed.notes, f"Wrote {output}"]))
        typer.echo(
            "The projector is untrained, so the model refuses questions about pictures; train it first: omni train "
            f"configs/train_projector.json --set model.checkpoint={output} --set model.image=null"
        )


@app.command()
def convert(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE", help="micro-Omni's files, or folders of them; with --to micro-omni, a checkpoint."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the result.")],
    to: Annotated[Literal["omni", "micro-omni"], typer.Option(help="Direction.")] = "omni",
    as_json: AsJson = False,
) -> None:
    """Convert checkpoints of micro-Omni to omni's, or back: omni convert vision.pt encoder."""
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


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model or of an encoder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the graphs.")],
    form: Annotated[Literal["onnx"], typer.Option("--format", help="onnx: runs in onnxruntime.")] = "onnx",
    as_json: AsJson = False,
) -> None:
    """Write a model as graphs that run without torch: omni export checkpoints/omni_tiny exported."""
    from omni.checkpoints.folder import CheckpointError
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
