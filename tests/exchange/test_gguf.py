"""What is no GGUF file, or would replace something, is refused in a sentence."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from omni.cli.app import app


@pytest.mark.parametrize("content", [None, b"", b"no such format", b"GGUF" + bytes(20)])
def test_what_is_no_gguf_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "model.gguf"
    if content is not None:
        file.write_bytes(content)
    done = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert "model.gguf' cannot be read as a GGUF file of a language model" in done.stderr
    assert "check the path, or get the file again" in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_folder_with_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "exists already" in done.stderr
