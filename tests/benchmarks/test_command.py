"""`python -m benchmarks` as a reader runs it, and what its jobs are made of."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import machine, pictures
from benchmarks.__main__ import JOBS, app
from benchmarks.measure import Contestant, Race


def test_the_last_line_is_one_json_document(python: Callable[..., Any]) -> None:
    done = python("-m", "benchmarks", "imports", "--rounds", "1", cwd=machine.ROOT)
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
    assert result.stderr.startswith("Error: Unknown job 'encodr'; known: encoder, ")


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


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with one GPU, as far as can be seen without using it; the list says when it was waited for."""
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(str(device)))
    return waited


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = CliRunner().invoke(app, ["encoder", "--device", name])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"Error: expected a CUDA GPU for device '{name}', found 0 that torch ")
    assert result.stderr.count("\n") == 1


def test_a_second_gpu_where_there_is_one_is_a_mistake(gpu: list[str]) -> None:
    assert machine.device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="for device 'cuda:1', found 1 "):
        machine.device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "meta", ""])
def test_what_is_no_device_is_a_mistake(name: str) -> None:
    result = CliRunner().invoke(app, ["--device", name])
    assert result.exit_code == 2
    assert result.stderr == f"Error: expected cpu, cuda or cuda:N as a device, found {name!r}; name one of these.\n"


def test_jobs_that_know_the_cpu_alone_are_a_mistake_on_a_gpu(gpu: list[str]) -> None:
    result = CliRunner().invoke(app, ["imports", "encoder", "files", "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stderr == (
        "Error: expected jobs that run on 'cuda' (encoder, training, generation), found 'files', 'imports'; "
        "leave them out, or measure them on the CPU.\n"
    )


def test_a_gpu_runs_the_jobs_that_know_it_by_its_own_clock(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def races(quick: bool, device: torch.device) -> list[Race]:
        asked.append((quick, str(device)))
        return [Race("a race", [Contestant("a", lambda: lambda: None)], sample=0)]

    for job in JOBS:
        monkeypatch.setattr(f"benchmarks.jobs.{job}.races", races)
    monkeypatch.setattr(machine, "hardware", lambda device: {"gpu": str(device)})
    result = CliRunner().invoke(app, ["--device", "cuda", "--quick", "--rounds", "2"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert list(document["jobs"]) == ["encoder", "training", "generation"]
    assert document["hardware"] == {"gpu": "cuda"}
    assert asked == [(True, "cuda")] * 3
    assert gpu == ["cuda"] * 3 * 2 * 2  # before and after each of two rounds of three races


def test_a_gpu_is_waited_for_before_the_time_is_read(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: len(gpu))
    assert machine.clock(torch.device("cuda", 0))() == 1
    assert gpu == ["cuda:0"]
    machine.clock(machine.CPU)()
    assert gpu == ["cuda:0"]


def test_a_large_product_is_counted_in_tflops(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(machine, "clock", lambda device: lambda: next(ticks))
    assert machine.matmul_tflops(machine.CPU, size=16) == pytest.approx(2 * 16**3 / 1e12)


def test_many_prepared_pictures_are_some_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DRAWN", 3)
    found = pictures.batch(7, machine.CPU, torch.bfloat16)
    assert (found.shape, found.dtype) == ((7, 3, 224, 224), torch.bfloat16)
    for i, picture in enumerate(found):
        torch.testing.assert_close(picture, pictures.pixels(3)[i % 3].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("quick", [False, True])
def test_on_a_gpu_the_encoder_runs_in_bfloat16_beside_its_peers(quick: bool) -> None:
    """Tensors of the device `meta` have shapes, and no numbers that would have to be computed."""
    throughput, latency = import_module("benchmarks.jobs.encoder").races(quick, torch.device("meta"))
    assert (throughput.items, latency.items) == (4 if quick else 1024, 1)
    for race, ways in ((throughput, 2), (latency, 3)):
        entrants = [contestant for contestant in race.contestants if contestant.part is None]
        assert len(entrants) == 5 * ways
        assert not [contestant.name for contestant in entrants if "packed" in contestant.name]
        for contestant in entrants:
            if contestant.ours and contestant.name.endswith("eager"):
                found = contestant.build()()
                assert (found.dtype, found.device.type, len(found)) == (torch.bfloat16, "meta", race.items)
