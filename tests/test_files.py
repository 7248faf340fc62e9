"""A file is there whole or as it was."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from omni.files import write_text_whole, write_whole


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("before")

    def half(file: BinaryIO) -> None:
        file.write(b"aft")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, half)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]
    write_text_whole(path, "nächste")
    assert path.read_text("utf-8") == "nächste"


def test_devices_stay_devices(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_text_whole(Path("/dev/full"), "x" * 100_000)
    write_text_whole(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text_whole(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
