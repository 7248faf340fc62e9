"""A file is there whole or as it was."""

import os
import re
from pathlib import Path
from typing import BinaryIO

import pytest

from omni.files import expect_ordinary, read_json, write_text_whole, write_whole


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


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zeros", Path("/dev/null")):
        with pytest.raises(OSError, match="it is a pipe or a device, expected an ordinary file"):
            read_json(path)
    assert expect_ordinary(tmp_path / "nothing") == tmp_path / "nothing"
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("[" * 100_000 + "]" * 100_000, "it is nested too deep"), ("{", "Expecting property name"), ("\ud83d", "utf-8")],
)
def test_invalid_json_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "a.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=sentence):
        read_json(tmp_path / "a.json")


def test_a_key_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    """Python would take the last one without a word."""
    (tmp_path / "a.json").write_text('{"optimizer": {"lr": 1, "name": "x", "lr": 2}}')
    with pytest.raises(ValueError, match="the key 'lr' occurs twice in one object"):
        read_json(tmp_path / "a.json")


def test_json_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert read_json(tmp_path / "a.json") == {"a": [1]}
    monkeypatch.setattr("omni.files.MAX_JSON", 9)
    with pytest.raises(ValueError, match=re.escape("it has 10 bytes, expected at most 9")):
        read_json(tmp_path / "a.json")
