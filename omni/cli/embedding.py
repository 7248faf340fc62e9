"""Many pictures become a table of vectors."""

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
        typer.Argument(metavar="PICTURES", help="Folder, pattern in quotes, or manifest; several may be given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="One file if it ends with .parquet, else a folder of them.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of an encoder.", show_default=SHIPPED_ENCODER)] = None,
    what: Annotated[
        Literal["cls", "grid", "projected"], typer.Option(help="One vector, all patches, or what a Thinker gets.")
    ] = "cls",
    precision: Annotated[Literal["float32", "bfloat16", "auto"], typer.Option(help="Of the arithmetic.")] = "float32",
    decode: Annotated[
        Literal["exact", "scaled"], typer.Option(help="scaled: JPEG files at 1/2, 1/4 or 1/8; faster, not the same.")
    ] = "exact",
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures that a core encodes together.")] = 32,
    shard_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of each file of a folder.", show_default="about 10000, or 128 MiB")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run was stopped.")] = False,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This machine, or a cluster of Ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of the cluster.", show_default="this machine alone")] = None,
    as_json: AsJson = False,
) -> None:
    """Embed many pictures into a Parquet table: omni embed photos --output out.parquet."""
    if not sources or output is None:
        refuse("Expected pictures and where to write, such as `omni embed photos --output out.parquet`.")
    if address is not None and engine != "ray":
        refuse("--address is that of a Ray cluster; add --engine ray, or leave it out.")
    folder = checkpoint or shipped_checkpoint(SHIPPED_ENCODER)
    from omni import embedding as encoding
    from omni.checkpoints.strict import CheckpointError
    from omni.data.sources import ManifestError

    quiet_transformers()
    of_encoding = (encoding.SourceError, encoding.EngineError, encoding.TableError, encoding.RayError)
    try:
        with user_errors(*of_encoding, ManifestError, CheckpointError), file_progress() as progress:
            report = encoding.embed(
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
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command with --resume goes on from here.", err=True)
        raise typer.Exit(130) from None
    if report.unreadable:
        typer.echo(
            f"{report.unreadable:,} of {report.rows:,} files have no embedding; the column `error` says why.", err=True
        )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        rate = f"{report.files_per_second:,} files/s" if report.computed else "all of them from before"
        typer.echo(f"{report.rows:,} rows in {report.output}, {rate}")
