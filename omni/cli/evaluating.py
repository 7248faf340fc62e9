"""The command that evaluates a checkpoint: evaluate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from omni.cli.commands import app
from omni.cli.console import (
    AllowPrivate,
    AsJson,
    Dtype,
    expect_checkpoint,
    expect_place,
    quiet_transformers,
    refuse,
    show,
    steps,
    user_errors,
    write_file,
)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="CHECKPOINT", help="Folder of a fused model, a classifier or an encoder.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Held-out scenes to ask about.", show_default="500")
    ] = None,
    first: Annotated[int | None, typer.Option(min=0, help="Number of the first scene.", show_default="0")] = None,
    split: Annotated[
        Literal["test", "pairs"] | None,
        typer.Option(help="pairs: pairs of shape and colour never trained on.", show_default="test"),
    ] = None,
    wordings: Annotated[
        Literal["seen", "held_out"] | None, typer.Option(help="Wordings of training, or others.", show_default="seen")
    ] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="Ask only this kind; may be repeated.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Ask the questions of this manifest, not scenes; search its pictures.")
    ] = None,
    queries: Annotated[
        list[str] | None,
        typer.Option("--query", help="Encoders: a group of the data that asks; may be repeated.", show_default="each"),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="Folder that its paths start from.", show_default="the manifest's")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Question for rows that have only a caption.")] = None,
    addresses: Annotated[
        Path | None, typer.Option(help="Allow addresses; folder for what is downloaded.", show_default="none allowed")
    ] = None,
    allow_private: AllowPrivate = False,
    fit_pictures: Annotated[
        int | None, typer.Option(min=1, help="Encoders: scenes to fit on.", show_default="1500")
    ] = None,
    sight: Annotated[bool, typer.Option("--sight", help="Ask again with the items blank, swapped, noise.")] = False,
    strangers: Annotated[
        Path | None, typer.Option(help="Items or questions unlike training, which the model should recognise.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions at once.", show_default="64")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="192")
    ] = None,
    dtype: Dtype = "auto",
    output: Annotated[Path | None, typer.Option(help="Write the result, as JSON.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Write every question and answer, as JSONL.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write items and answers, mistakes first, as .html.")] = None,
    sheet_pictures: Annotated[int, typer.Option(min=1, help="Examples on the sheet, at most.")] = 60,
    card: Annotated[Path | None, typer.Option(help="Put the scores into this model card (README.md).")] = None,
    verify: Annotated[Path | None, typer.Option(help="Measure a written result again, and compare.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--checkpoint", help="Same as CHECKPOINT.", show_default="with --verify the result's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a fused model or a classifier, with 95 % intervals and the best constant answer; or probe an encoder."""
    if checkpoint is not None and folder is not None:
        refuse("CHECKPOINT and --checkpoint are the same; give one of them.")
    from omni.data.layouts import expect_rows
    from omni.data.sources import ManifestError

    folder = checkpoint or folder
    options = {
        "pictures": pictures,
        "first": first,
        "split": split,
        "wordings": wordings,
        "kinds": kinds or None,
        "data": data,
        "queries": queries or None,
        "root": root and str(root),
        "prompt": prompt,
        "addresses": addresses and str(addresses),
        "allow_private": allow_private or None,
        "fit_pictures": fit_pictures,
        "sight": sight or None,
        "strangers": strangers and str(strangers),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype if dtype != "auto" else None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if verify is not None and given:
        refuse("--verify asks as the result says; leave out the options that say what to ask.")
    _expect_outputs(output, answers, sheet, card)
    if folder is not None:
        expect_checkpoint(folder)
    if data is not None:
        with user_errors(ManifestError):
            expect_rows(data)
    from omni import evaluation
    from omni.checkpoints.folder import CheckpointError
    from omni.modality import ItemError
    from omni.worlds import WorldError

    quiet_transformers()
    own_errors = (CheckpointError, evaluation.EvaluationError, ManifestError, ItemError, WorldError)
    with user_errors(*own_errors), steps() as progress:
        if card is not None:
            evaluation.read_card(card)
        if verify is not None:
            comparison = evaluation.measure_again(evaluation.Result.read(verify), folder, progress)
            outcome = comparison.outcome
        elif folder is not None:
            comparison = None
            outcome = evaluation.evaluate(folder, evaluation.choose_settings(folder, **given), progress)
        else:
            refuse("Expected the folder of a checkpoint, or --verify with a result; found neither.")
    if outcome is None:
        typer.echo("The checkpoint cannot be loaded, so nothing is measured or written.", err=True)
    else:
        finished = outcome
        writers: list[tuple[Path | None, Callable[[Path], None]]] = [
            (output, finished.result.write),
            (answers, lambda path: evaluation.write_answers(path, finished.asked)),
            (sheet, lambda path: evaluation.write_sheet(path, finished, sheet_pictures)),
            (card, lambda path: evaluation.update_card(path, finished.result)),
        ]
        for target, write in writers:
            if target is not None:
                write_file(target, write)
    if comparison is not None:
        _print_comparison(comparison, as_json)
    elif outcome is not None:
        _print_result(outcome.result, as_json)


def _expect_outputs(output: Path | None, answers: Path | None, sheet: Path | None, card: Path | None) -> None:
    """Refuse names under which no file can be written, before anything is measured."""
    targets = [path.absolute() for path in (output, answers, sheet, card) if path is not None]
    for path in targets:
        expect_place(path)
        if path.is_dir():
            refuse(f"Expected the name of a file, but {str(path)!r} is a folder; name a file in it.")
        if targets.count(path) > 1:
            refuse(f"{str(path)!r} would be written twice; give each output its own name.")
    if sheet is not None and sheet.suffix != ".html":
        refuse(f"Expected a file name that ends with .html, found {str(sheet)!r}; the sheet is one HTML file.")


def _print_result(result: Any, as_json: bool) -> None:
    """Print the scores. The exit status is 1 if a sight test failed."""
    from omni import evaluation
    from omni.registry import get_modality

    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        show(evaluation.render(result))
    failed = [get_modality(name).noun for name, test in result.sight_tests.items() if not test.passed]
    for noun in failed:
        typer.echo(f"The sight test failed: the answers are as good without the {noun} as with it.", err=True)
    if failed:
        raise typer.Exit(1)


def _print_comparison(comparison: Any, as_json: bool) -> None:
    """Print the differences from an earlier result. The exit status is 1 if there is one."""
    differences, elsewhere = comparison.differences, comparison.elsewhere
    if as_json:
        found = {"differences": differences, "elsewhere": elsewhere}
        document = {name: [each.model_dump() for each in listed] for name, listed in found.items()}
        typer.echo(json.dumps({"same": not differences, **document}, indent=2))
    else:
        typer.echo("\n".join(map(str, differences)) or "Measured again, all hashes and scores are the same")
        for each in elsewhere:
            typer.echo(f"This differs too, and may be the cause: {each}", err=True)
    if differences:
        raise typer.Exit(1)
