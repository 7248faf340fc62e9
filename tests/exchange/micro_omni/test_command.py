"""`omni convert` as it is typed, and its page in the documentation, with micro-Omni's own sizes."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from omni.cli.app import app
from omni.vision.pictures import read_picture

PAGE = Path("docs/micro-omni.md").read_text(encoding="utf-8")
SCENE = Path("examples/scene.png").resolve()


def test_it_answers_as_micro_omni_does(micro_omni: Any, tmp_path: Path) -> None:
    """From its files to words, as a user goes, and the words are those that its own modules say."""
    micro_omni.write(tmp_path)
    arguments = ["convert", str(tmp_path / "omni.pt"), str(tmp_path / "mine")]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).stderr == ""
    question = "Name the shape of the thing"
    arguments = ["ask", str(SCENE), question, "--checkpoint", str(tmp_path / "mine"), "--max-new-tokens", "12"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    squashed = np.asarray(read_picture(SCENE).resize((32, 32), 2), dtype=np.float32)
    with torch.no_grad():
        expected = micro_omni.answer(torch.from_numpy(squashed).permute(2, 0, 1)[None] / 255, question, 12)
    assert len(expected.split()) > 1
    assert result.stdout.strip() == expected


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "vision.pt").write_text("no weights")
    for arguments in (
        [tmp_path / "vision.pt", tmp_path / "ours"],
        ["--to", "micro-omni", tmp_path, tmp_path / "theirs"],
        ["--to", "micro-omni", "checkpoints/omni_tiny", tmp_path / "theirs"],
        ["--to", "micro-omni", "checkpoints/omni_tiny", "checkpoints/vision_tiny", tmp_path / "theirs"],
    ):
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
        assert (result.exit_code, result.stdout) == (2, "")
        assert re.fullmatch(r"Error: .+\.\n", result.stderr), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vision.pt"]


def test_nothing_but_json_is_printed_for_scripts(tmp_path: Path) -> None:
    arguments = ["convert", "--to", "micro-omni", "checkpoints/vision_tiny", str(tmp_path / "theirs"), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["parameters"] == {"vision_encoder": 916_992}
    assert result.stderr == f"Note: {document['notes'][0]}.\n"


def test_the_page_is_true(
    make_micro_omni: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its commands print what it shows, and its Python runs, on a system of micro-Omni's own sizes."""
    sizes = {"img_size": 224, "patch": 16, "d_model": 128, "n_layers": 4, "n_heads": 2, "d_ff": 512, "dropout": 0.1}
    thinker = {"vocab_size": 32_000, "d_model": 256, "n_layers": 4, "n_heads": 4, "d_ff": 1024, "ctx_len": 512}
    make_micro_omni(vision=sizes, **thinker).write(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^```console\n\$ omni (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command, shown in commands:
        result = CliRunner().invoke(app, shlex.split(command), catch_exceptions=False)
        assert (result.exit_code, result.stdout) == (0, shown), result.stderr
    (script,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    capsys.readouterr()
    exec(compile(script, "docs/micro-omni.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", script, re.MULTILINE)
