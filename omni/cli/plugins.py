"""The command for authors of plug-ins: check-plugin."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from omni.cli.commands import app
from omni.cli.console import AsJson, quiet_transformers, refuse, show, status, user_errors
from omni.files import read_json


@app.command()
def check_plugin(
    package: Annotated[
        str,
        typer.Argument(metavar="PACKAGE", help="An installed package, the name of a modality, or module:attribute."),
    ],
    file: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True, dir_okay=False, help="An example file of the modality; give it several times for several."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="JSON settings of the encoder.", show_default="the plug-in's defaults"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a plug-in against the contract: omni check-plugin omni-wave.

    It tries the bundle, its encoder, a small fused model and every command, and says what to fix. The exit status is 1 if a
    check fails.
    """
    with status("starting") as say:
        from omni.contract.checks import Finding, examine
        from omni.contract.plugins import PluginError, find
        from omni.contract.subject import Subject
        from omni.contract.suite import CHECKS

        quiet_transformers()
        with user_errors(PluginError):
            plugins = find(package)
        settings = _settings(config)
        found: dict[str, list[Finding]] = {}
        for modality in plugins:
            own = [each for each in file or [] if len(plugins) == 1 or each.name.lower().endswith(modality.suffixes)]
            if own and modality.open is None:
                refuse(f"The modality {modality.name!r} opens no files, found --file {str(own[0])!r}; leave it out.")
            subject = Subject(modality, own, settings, address=package if ":" in package else None)
            found[modality.name] = list(examine(subject, CHECKS, lambda check: say(f"checking {check}")))
    failed = any(finding.result == "failed" for findings in found.values() for finding in findings)
    if as_json:
        listed = {name: [finding.model_dump() for finding in findings] for name, findings in found.items()}
        typer.echo(json.dumps({"package": package, "passed": not failed, "modalities": listed}, indent=2))
    else:
        for name, findings in found.items():
            _print(name, findings)
    if failed:
        raise typer.Exit(1)


def _settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = read_json(path)
    except OSError as error:
        refuse(f"The settings {str(path)!r} cannot be read ({error.strerror}); check the path.")
    except ValueError as error:
        refuse(f"The settings {str(path)!r} are not JSON ({error}); correct them.")
    if not isinstance(values, dict):
        refuse(f"The settings {str(path)!r} should be a JSON object, found a {type(values).__name__}; correct them.")
    return values


def _print(name: str, findings: list[Any]) -> None:
    from rich.table import Table

    table = Table(title=f"modality {name}")
    for column in ("check", "result", "what it means"):
        table.add_column(column, no_wrap=column != "what it means")
    colours = {"passed": "green", "failed": "bold red"}
    for finding in findings:
        table.add_row(finding.check, finding.result, finding.sentence, style=colours.get(finding.result, "dim"))
    show(table)
    counts = Counter(finding.result for finding in findings)
    typer.echo(", ".join(f"{counts[each]} {each}" for each in ("passed", "failed", "not offered", "not run")))
