"""What a run says while it runs: bars on a terminal, lines in a log, nothing that frightens."""

import json
import os
import shutil
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.testing import CliRunner

from omni.cli.app import app
from omni.training.trainer import Progress

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_log_has_lines_alone(
    small: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that is resumed, whose head stands in no file, being the embedding."""
    settings: dict[str, Any] = json.loads((CONFIGS / "train_pictures.json").read_text())
    data = {"path": str(pictures)}
    settings |= {"model": {"checkpoint": str(small / "omni")}, "train": data, "evaluate": data, "about": None}
    settings["arguments"] = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1}
    settings["arguments"] |= {"use_cpu": True, "report_to": "none", "eval_strategy": "steps", "eval_steps": 1}
    (tmp_path / "recipe.json").write_text(json.dumps(settings | {"output": str(tmp_path / "out")}))
    said = []
    for resume in ([], ["--resume"]):
        ended = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.json"), *resume])
        assert ended.exit_code == 0, ended.output
        out, err = capfd.readouterr()
        assert "%|" not in ended.output + out + err
        assert "lm_head" not in ended.output + out + err
        said.append([line for line in ended.stdout.splitlines() if "'loss'" in line])
        shutil.rmtree(tmp_path / "out" / "run" / "checkpoint-2")
        for file in (tmp_path / "out").glob("*.*"):
            file.unlink()
    assert [len(lines) for lines in said] == [2, 1]
    assert said[0][1] == said[1][0]


def test_a_resumed_bar_counts_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its rate would be that of all steps of the run, done in the time of this session."""
    outer, inner = os.openpty()
    os.set_blocking(outer, False)
    termios.tcsetwinsize(inner, (24, 80))
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress = Progress()
        state = TrainerState(global_step=400, max_steps=1000)
        progress.on_train_begin(TrainingArguments(tmp_path, report_to="none"), state, TrainerControl())
        progress.training_bar.update(0)
        drawn = os.read(outer, 1000).decode()
        progress.training_bar.close()
    os.close(outer)
    assert "400/1000" in drawn
    assert progress.training_bar.format_dict["rate"] is None  # of the steps since: none
    assert progress.training_bar.initial == 400
