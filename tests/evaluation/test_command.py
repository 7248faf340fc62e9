"""`omni evaluate` as it is typed: what it prints and writes, how it ends, and what it says about mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from omni.checkpoints.seal import reseal

from ..conftest import invoke, refuse

FEW = ("--pictures", 4, "--kind", "color", "--kind", "dark")


def test_json_on_stdout_is_what_is_written(fused: Path, tmp_path: Path) -> None:
    done = invoke("evaluate", fused, *FEW, "--first", 7, "--json", "--output", tmp_path / "result.json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "result.json").read_text())
    settings = json.loads(done.stdout)["settings"]
    assert (settings["first"], settings["pictures"], settings["kinds"]) == (7, 4, ["color", "dark"])
    assert done.stderr == f"Wrote {tmp_path / 'result.json'}\n"


def test_measuring_again_ends_with_0_or_1(fused: Path, copy: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert invoke("evaluate", fused, *FEW, "--output", path).exit_code == 0
    again = invoke("evaluate", "--verify", path, "--checkpoint", copy)
    assert (again.exit_code, again.stdout) == (0, "Measured again, all hashes and scores are the same\n")
    document = json.loads(invoke("evaluate", "--verify", path, "--json").stdout)
    assert document == {"same": True, "differences": [], "elsewhere": []}
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text().replace("<|user|>", "user: "))
    reseal(copy)
    other = invoke("evaluate", copy, "--verify", path, "--output", path)
    assert other.exit_code == 1
    assert {line.split(":")[0] for line in other.stdout.splitlines()} >= {"prompts", "preprocessing"}
    assert "weights" not in other.stdout
    assert other.stderr == f"Replaced {path}\n"
    assert invoke("evaluate", "--verify", path).exit_code == 0  # the file holds the other result now


def test_a_card_and_a_sheet(vision: Path, tmp_path: Path) -> None:
    card, sheet = tmp_path / "README.md", tmp_path / "sheet.html"
    card.write_text("# A model\n")
    few = ("--pictures", 10, "--fit-pictures", 100, "--kind", "dark")
    done = invoke("evaluate", vision, *few, "--card", card, "--sheet", sheet, "--sheet-pictures", 3)
    assert done.exit_code == 0, done.stderr
    assert "dark / probe" in done.stdout
    assert "| dark / probe | 10 |" in card.read_text()
    assert sheet.read_text().count("<img ") == 3
    assert done.stderr == f"Wrote {sheet}\nReplaced {card}\n"


def test_mistakes_are_told_before_anything_is_measured(fused: Path, vision: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert "found neither" in refuse(
        "evaluate",
    )
    assert "are the same; give one of them" in refuse("evaluate", fused, "--checkpoint", fused)
    assert "The checkpoint 'nowhere' does not exist" in refuse("evaluate", "nowhere")
    assert "The model card" in refuse("evaluate", fused, "--card", tmp_path / "README.md")
    assert "ends with .html, found 'sheet.png'" in refuse("evaluate", fused, "--sheet", "sheet.png")
    assert "its folder does not exist" in refuse("evaluate", fused, "--output", tmp_path / "no" / "result.json")
    assert "leave out the options" in refuse("evaluate", "--verify", path, "--pictures", 3)
    assert "result.json' cannot be read: No such file" in refuse("evaluate", "--verify", path)
    path.write_text("{}")
    assert "is not a result that `omni evaluate --output` wrote: checkpoint: Field required" in refuse(
        "evaluate", "--verify", path
    )
    assert "which does not take --split" in refuse("evaluate", vision, "--split", "pairs")
    assert "which does not take --fit-pictures" in refuse("evaluate", fused, "--fit-pictures", 200)
    assert "which does not take --first" in refuse("evaluate", fused, "--data", path, "--first", 0)
    assert "leave out the options" in refuse("evaluate", "--verify", path, "--first", 0)
    assert "Unknown kinds of questions ['colour']" in refuse("evaluate", fused, "--kind", "colour")
    assert "'nothing.jsonl' does not exist" in refuse("evaluate", fused, "--data", "nothing.jsonl")


def test_a_picture_that_cannot_be_read_is_a_mistake(fused: Path, make_manifest: Callable[..., Path]) -> None:
    path = make_manifest()
    (path.parent / "2.png").write_bytes(b"")
    assert "line 3: " in refuse("evaluate", fused, "--data", path)


@pytest.mark.parametrize("arguments", [["--pictures", 0], ["--split", "train"], ["--sheet-pictures", 0]])
def test_wrong_usage(arguments: list[object], fused: Path) -> None:
    assert invoke("evaluate", fused, *arguments).exit_code == 2


def test_a_failed_sight_test_is_exit_status_1(fused: Path) -> None:
    """Whether the background is dark: so few answers that they may be right by chance."""
    done = invoke("evaluate", fused, "--pictures", 2, "--kind", "dark", "--sight")
    assert done.exit_code == 1
    assert "Sight test FAILED" in done.stdout
    assert done.stderr.startswith("The sight test failed: ")
