"""The comparison with ten lines of torch, on folders of a few pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.class_folders import digits
from benchmarks.ten_lines import ten_lines


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(8):
        folder = tmp_path / "pictures" / ("dark", "bright")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 60, (40, 30, 3))
        Image.fromarray((noise + 150 * (number % 2)).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


def test_the_ten_lines_learn(pictures: Path) -> None:
    found = ten_lines(str(pictures), str(pictures), seconds=1)
    assert found["accuracy"] == 1
    assert found["steps"] == found["epochs"] / 8


def test_folders_of_digits(tmp_path: Path) -> None:
    digits(tmp_path)
    assert [len([*(tmp_path / split).glob("*/*.png")]) for split in ("train", "test")] == [1437, 360]


@pytest.mark.slow
def test_both_scores_come_from_one_run(pictures: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.ten_lines", str(pictures), str(pictures), "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line[:20].strip() for line in done.stdout.splitlines()[-3:]] == [
        "best constant answer",
        "ten lines of torch",
        "omni train train_cla",
    ]
