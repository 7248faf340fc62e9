"""`python -m campaigns`: a table with the result of each campaign, and a line for each failure."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from campaigns import flips, rows, shapes
from campaigns.__main__ import NAMES, app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout + result.stderr


def test_campaigns_are_found_by_themselves() -> None:
    assert {"flips", "shapes"} <= set(NAMES)
    assert not {"tally", "__main__"} & set(NAMES)
    code, said = run("flops")
    assert code == 2
    assert said == f"Error: no campaign 'flops'; there are {', '.join(NAMES)}.\n"


def test_a_table_of_what_was_tried() -> None:
    code, said = run("flips", "shapes", "--count", 3, "--seed", 5)
    assert code == 0, said
    for name in ("flips", "shapes"):
        (row,) = (line for line in said.splitlines() if name in line)
        tried, refused, unchanged, failures, _ = (int(cell) for cell in row.split("│")[2:-1])
        assert (tried, refused + unchanged, failures) == (3, 3, 0)


def test_the_time_ends_a_campaign() -> None:
    assert run("shapes", "--count", 10**9, "--seconds", 0.1)[0] == 0


@pytest.mark.slow
def test_a_change_in_an_unsealed_folder_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies have neither seals nor fingerprints. The line of a failure says how to repeat it."""
    for name in ("omni_tiny", "vision_tiny", "vision_world", "audio_tiny"):
        shutil.copytree(flips.CHECKPOINTS / name, tmp_path / name)
        for path in [*(tmp_path / name).glob("*seal.json"), tmp_path / name / "README.md"]:
            path.unlink()
    monkeypatch.setattr(flips, "CHECKPOINTS", tmp_path)
    code, said = run("flips", "--count", 120, "--seed", 0)
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith("flips, seed 0: byte ")]
    assert any("loaded with different" in line for line in lines), said


@pytest.mark.slow
def test_odd_rows_are_read_or_refused_in_a_sentence() -> None:
    tally = rows.run(seed=0, count=200, seconds=300)
    assert tally.failures == ()
    assert tally.tried == tally.refused + tally.unchanged == 200
    assert tally.unchanged > 10


def test_a_value_is_replaced_or_goes() -> None:
    values = {"a": [1, {"b": 2}], "c": 3}
    assert [*shapes.paths(values)] == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    assert shapes.changed(values, ("a", 1, "b"), None) == {"a": [1, {"b": None}], "c": 3}
    assert shapes.changed(values, ("c",), shapes.GONE) == {"a": [1, {"b": 2}]}
    assert values == {"a": [1, {"b": 2}], "c": 3}
