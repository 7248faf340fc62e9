"""The commands that turn many files into a table of vectors, and search in it: embed, search, duplicates."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import (
    SHIPPED_ENCODER,
    AsJson,
    expect_checkpoint,
    expect_place,
    file_progress,
    quiet_transformers,
    refuse,
    shipped_checkpoint,
    user_errors,
    write_file,
)
from omni.files import write_whole


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
    normalize: Annotated[bool, typer.Option("--normalize", help="Divide each vector by its length.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed many pictures, sounds or other files into a Parquet table: omni embed photos --output out.parquet."""
    if not sources or output is None:
        refuse("Expected files and an output, such as `omni embed photos --output out.parquet`.")
    if address is not None and engine != "ray":
        refuse("--address names a Ray cluster; add --engine ray, or leave it out.")
    folder = checkpoint or shipped_checkpoint(SHIPPED_ENCODER)
    from omni.data.finding import SourceError, expect_source

    expect_checkpoint(folder)
    expect_place(output)
    with user_errors(SourceError):
        for source in sources:
            expect_source(source)
    from omni import embedding
    from omni.checkpoints.folder import CheckpointError
    from omni.data.sources import ManifestError

    quiet_transformers()
    own_errors = (SourceError, embedding.EngineError, embedding.TableError, embedding.RayError)
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
                normalize=normalize,
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


Table = Annotated[Path, typer.Argument(metavar="TABLE", help="What `omni embed` wrote.")]
Sheet = Annotated[Path | None, typer.Option(help="Draw the items found as one picture, as .png.")]


@app.command()
def search(
    table: Table,
    like: Annotated[Path | None, typer.Option(metavar="FILE", help="Find what is like this file.")] = None,
    text: Annotated[str | None, typer.Option(help="Find what fits these words.")] = None,
    most: Annotated[int, typer.Option(min=1, help="Rows to find.")] = 10,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the encoder.", show_default="the one that made the table")
    ] = None,
    sheet: Sheet = None,
    as_json: AsJson = False,
) -> None:
    """Find the rows of a table that are most like a file, or fit a text: omni search out.parquet --like wren.jpg."""
    if (like is None) == (text is None):
        refuse("Expected either --like with a file or --text with words.")
    with _searching(table, sheet) as embedding:
        hits = embedding.search(table, like=like, text=text, most=most, checkpoint=checkpoint)
        _draw(sheet, table, [hits])
    if as_json:
        typer.echo(json.dumps([hit.model_dump() for hit in hits], indent=2))
    else:
        typer.echo("\n".join(map(_line, hits)) or "Nothing found")


@app.command()
def duplicates(
    table: Table,
    least: Annotated[float, typer.Option(min=-1, max=1, help="Least similarity of two that are the same.")] = 0.98,
    sheet: Sheet = None,
    as_json: AsJson = False,
) -> None:
    """Find rows of a table that are nearly the same: omni duplicates out.parquet."""
    with _searching(table, sheet) as embedding:
        groups = embedding.duplicates(table, least)
        _draw(sheet, table, groups)
    if as_json:
        typer.echo(json.dumps([[hit.model_dump() for hit in group] for group in groups], indent=2))
    else:
        rows = sum(map(len, groups))
        typer.echo(f"{len(groups):,} groups of {rows:,} files that are nearly the same")
        for group in groups:
            typer.echo("\n".join(["", *map(_line, group)]))


def _line(hit: Any) -> str:
    return f"{hit.similarity:.3f}  {hit.path}"


@contextmanager
def _searching(table: Path, sheet: Path | None) -> Iterator[Any]:
    """Check the options before heavy imports; then yield `omni.embedding`, and report its errors as the user's."""
    if not table.exists():
        refuse(f"{str(table)!r} does not exist, expected a table that `omni embed` wrote; check the path.")
    if sheet is not None and sheet.suffix.lower() != ".png":
        refuse(f"Expected a file name that ends with .png, found {str(sheet)!r}; the sheet is a picture.")
    if sheet is not None:
        expect_place(sheet)
    from omni import embedding
    from omni.checkpoints.folder import CheckpointError
    from omni.modality import ItemError

    quiet_transformers()
    own_errors = (embedding.SearchError, embedding.TableError, embedding.EngineError)
    with user_errors(*own_errors, CheckpointError, ItemError):
        yield embedding


def _draw(sheet: Path | None, table: Path, rows: list[list[Any]]) -> None:
    from omni import embedding

    if sheet is not None:
        drawn = embedding.draw_sheet(rows, embedding.SearchTable.open(table).modality)
        write_file(sheet, lambda path: write_whole(path, lambda file: drawn.save(file, "PNG")))
