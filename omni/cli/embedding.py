"""The command that turns many files into a table of vectors: embed."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import (
    SHIPPED_ENCODER,
    AsJson,
    file_progress,
    quiet_transformers,
    refuse,
    shipped_checkpoint,
    user_errors,
)


@app.command()
def embed(
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="Folders, patterns in quotes, or manifests."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A new file *.parquet, or a new folder of such files.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of an encoder.", show_default=SHIPPED_ENCODER)] = None,
    what: Annotated[
        Literal["cls", "grid", "projected"],
        typer.Option(help="One vector, all tokens of the encoder, or the Thinker's."),
    ] = "cls",
    precision: Annotated[
        Literal["float32", "bfloat16", "auto"], typer.Option(help="Arithmetic of the encoder.")
    ] = "float32",
    decode: Annotated[
        Literal["exact", "scaled"], typer.Option(help="scaled: JPEG files at 1/2, 1/4 or 1/8; faster, less exact.")
    ] = "exact",
    batch_size: Annotated[int, typer.Option(min=1, help="Files that a core encodes at once.")] = 32,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows in each file of a folder.", show_default="about 10000, or 128 MiB")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an earlier run that was stopped.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This machine, or a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Address of the cluster.", show_default="this machine alone")
    ] = None,
    modality: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a model with several encoders, which one.", show_default="its own"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Embed many pictures, sounds or other files into a Parquet table: omni embed photos --output out.parquet."""
    if not sources or output is None:
        refuse("Expected files and an output, such as `omni embed photos --output out.parquet`.")
    if address is not None and engine != "ray":
        refuse("--address names a Ray cluster; add --engine ray, or leave it out.")
    folder = checkpoint or shipped_checkpoint(SHIPPED_ENCODER)
    from omni import embedding
    from omni.checkpoints.folder import CheckpointError
    from omni.data.sources import ManifestError

    quiet_transformers()
    own_errors = (embedding.SourceError, embedding.EngineError, embedding.TableError, embedding.RayError)
    try:
        with user_errors(*own_errors, ManifestError, CheckpointError), file_progress() as progress:
            done = embedding.embed(
                sources,
                folder,
                output,
                what=what,
                precision=precision,
                decode=decode,
                batch_size=batch_size,
                shard_rows=shard_rows,
                resume=resume,
                runner=engine,
                address=address,
                modality=modality,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo("Stopped. Run the same command with --resume to continue.", err=True)
        raise typer.Exit(130) from None
    if done.unreadable:
        typer.echo(
            f"{done.unreadable:,} of {done.rows:,} files have no embedding; the column `error` says why.", err=True
        )
    if as_json:
        typer.echo(done.model_dump_json(indent=2))
    else:
        rate = f"{done.files_per_second:,} files/s" if done.computed else "all from an earlier run"
        typer.echo(f"{done.rows:,} rows in {done.output}, {rate}")
