"""`python -m benchmarks` as a reader runs it, and what its jobs are made of."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import machine, pictures
from benchmarks.__main__ import JOBS, app


def test_the_last_line_is_one_json_document() -> None:
    command = [sys.executable, "-m", "benchmarks", "imports", "--rounds", "1"]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert any("omni --help" in line for line in table)
    document = json.loads(last)
    assert {"date", "commit", "dirty", "hardware", "versions", "load_before", "rounds", "quick", "jobs"} == {*document}
    assert {"cpu", "cores", "flags", "memory_gib", "threads", "system"} == {*document["hardware"]}
    assert {"python", "omni", "torch", "transformers", "timm", "pillow", "safetensors"} == {*document["versions"]}
    assert document["hardware"]["cores"] >= 1
    assert document["rounds"] == 1
    (race,) = document["jobs"]["imports"]
    assert race["fastest_peer"] == "import torch"
    medians = {entry["name"]: entry["median"] for entry in race["contestants"]}
    assert medians["import torch"] > medians["import omni"] > 0


def test_an_unknown_job_is_a_mistake() -> None:
    result = CliRunner().invoke(app, ["encodr"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: no job 'encodr'; there are encoder, ")


def test_every_file_of_jobs_is_a_job() -> None:
    files = {path.stem for path in (machine.ROOT / "benchmarks" / "jobs").glob("*.py")} - {"__init__"}
    assert files == {*JOBS}


@pytest.mark.parametrize("job", JOBS)
def test_a_race_has_ours_and_peers_under_different_names(job: str) -> None:
    race = next(iter(import_module(f"benchmarks.jobs.{job}").races(quick=True)))
    names = [contestant.name for contestant in race.contestants]
    assert len(names) == len({*names})
    entrants = [contestant for contestant in race.contestants if contestant.part is None]
    assert {contestant.ours for contestant in entrants} == {True, False}


def test_versions_name_what_is_missing_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == {"commit": None, "dirty": None}
    assert machine.versions()["torch"]


def test_photos_are_as_heavy_as_photos_and_all_different(tmp_path: Path) -> None:
    paths = [Path(path) for path in pictures.write_photos(tmp_path, 2, (640, 480))]
    for path in paths:
        with Image.open(path) as file:
            assert (file.format, file.size) == ("JPEG", (640, 480))
        assert 0.2 < path.stat().st_size / (640 * 480) < 0.4
    assert paths[0].read_bytes() != paths[1].read_bytes()


@torch.inference_mode()
def test_prepared_pictures_may_be_learnt_from_whoever_asked_for_them_first() -> None:
    assert not pictures.pixels(3).is_inference()


def test_the_same_pictures_as_bytes_and_as_prepared() -> None:
    expected = pictures.raw(2).permute(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(pictures.pixels(2), expected, atol=1e-6)
