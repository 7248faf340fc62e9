"""`omni embed` as it is typed: what it prints and writes, how it ends, and what it says about mistakes."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from omni.cli.app import app

from ..conftest import invoke, refuse

OMNI = Path(sys.executable).with_name("omni")
Make = Callable[..., Path]


def test_one_line_tells_what_was_done(make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Path("checkpoints/vision_world").absolute()
    make_pictures(5)
    monkeypatch.chdir(tmp_path)
    done = invoke("embed", "pictures", "--output", "out.parquet")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    line, rate = done.stdout.strip().split(", ")
    assert line == "5 rows in out.parquet"
    assert rate.endswith(" files/s")
    assert float(rate.split()[0]) > 0
    again = invoke("embed", "pictures", "-o", "out.parquet", "--resume", "--checkpoint", checkpoint)
    assert (again.exit_code, again.stdout) == (0, "5 rows in out.parquet, all from an earlier run\n")
    assert [row["path"][:9] for row in pq.read_table("out.parquet").to_pylist()] == ["pictures/"] * 5


def test_json_and_unreadable_files(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    pictures = make_pictures(5)
    (pictures / "text.png").write_text("hello")
    done = invoke(
        "embed", pictures, "--output", tmp_path / "out", "--checkpoint", save_encoder(), "--shard-rows", 4, "--json"
    )
    assert done.exit_code == 0
    assert done.stderr == "1 of 6 files have no embedding; the column `error` says why.\n"
    report = json.loads(done.stdout)
    seconds, rate = report.pop("seconds"), report.pop("files_per_second")
    assert report == {"output": str(tmp_path / "out"), "rows": 6, "unreadable": 1, "computed": 6}
    assert rate == pytest.approx(6 / seconds, abs=0.06)
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_every_option_reaches_the_table(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    settings = {"what": "grid", "precision": "bfloat16", "decode": "scaled", "batch-size": 2, "shard-rows": 3}
    options = [text for name, value in settings.items() for text in (f"--{name}", value)]
    done = invoke("embed", make_pictures(7), "-o", tmp_path / "out", "--checkpoint", save_encoder(), *options)
    assert done.exit_code == 0, done.stderr
    document = json.loads(pq.read_schema(tmp_path / "out" / "part-00002.parquet").metadata[b"omni"])
    assert {name: document[name.replace("-", "_")] for name in settings} == settings


def test_mistakes_are_one_sentence(
    save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, output = ("--checkpoint", save_encoder()), ("--output", tmp_path / "out.parquet")
    pictures = make_pictures(2)
    (tmp_path / "empty").mkdir()
    assert "Expected files and an output, such as `omni embed photos" in refuse(
        "embed",
    )
    assert "Expected files and an output" in refuse("embed", pictures)
    assert "add --engine ray" in refuse("embed", pictures, *output, *encoder, "--address", "auto")
    assert "empty' holds no picture" in refuse("embed", tmp_path / "empty", *output, *encoder)
    assert "nowhere' does not exist" in refuse("embed", tmp_path / "nowhere", *output, *encoder)
    assert "empty' has no config.json" in refuse("embed", pictures, *output, "--checkpoint", tmp_path / "empty")
    assert "no 'projected'" in refuse("embed", pictures, *output, *encoder, "--what", "projected")
    assert "for files of 5 rows name a folder" in refuse("embed", pictures, *output, *encoder, "--shard-rows", 5)
    assert "its folder does not exist" in refuse("embed", pictures, "-o", tmp_path / "no" / "out.parquet", *encoder)
    (tmp_path / "rows.jsonl").write_text('{"caption": "no picture"}\n')
    assert "None of the first 1 rows can be read" in refuse("embed", tmp_path / "rows.jsonl", *output, *encoder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert 'pip install "omni-thinker[scale]"' in refuse("embed", pictures, *output, *encoder, "--engine", "ray")
    assert not list(tmp_path.glob("out*"))
    assert invoke("embed", pictures, *output, *encoder).exit_code == 0
    assert "exists already and is not replaced" in refuse("embed", pictures, *output, *encoder)
    assert "with batch_size 32, found 8 now" in refuse(
        "embed", pictures, *output, *encoder, "--resume", "--batch-size", 8
    )


def test_a_terminal_sees_how_fast_it_goes(
    save_encoder: Make, make_pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["embed", make_pictures(40), "-o", tmp_path / "o.parquet", "--checkpoint", save_encoder()]
    terminal, its_end = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    shown = b""

    def look() -> None:
        nonlocal shown
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(terminal, 4096):
                shown += chunk

    looking = threading.Thread(target=look)
    looking.start()
    with os.fdopen(its_end, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        app([*map(str, command)], standalone_mode=False)
    looking.join()
    assert b"40/40" in shown
    assert b"files/s" in shown


def test_an_interrupt_says_how_to_continue(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    pictures, output = make_pictures(2500), tmp_path / "out.parquet"
    command = ["embed", pictures, "--checkpoint", save_encoder(), "--batch-size", "4", "--output", output]
    process = subprocess.Popen(
        [OMNI, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # what a shell runs in the background ignores it, and so does whatever that starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 600  # a busy machine takes long to begin
    while not list(tmp_path.glob("out.parquet.parts/*.parquet")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, "")
    assert stderr == "Stopped. Run the same command with --resume to continue.\n"
    done = invoke("embed", *command[1:], "--resume", "--json")
    assert 0 < json.loads(done.stdout)["computed"] < 2500
    assert pq.read_metadata(output).num_rows == 2500


@pytest.mark.long  # test_embedding.py kills at random moments
def test_killed_and_resumed(save_encoder: Make, make_pictures: Make, tmp_path: Path) -> None:
    """The process itself, with the signal that cannot be caught."""
    command = [OMNI, "embed", make_pictures(2500), "--checkpoint", save_encoder(), "--batch-size", "4", "--output"]
    straight, cut = tmp_path / "straight.parquet", tmp_path / "cut.parquet"
    subprocess.run([*map(str, command), straight], check=True, timeout=300, capture_output=True)
    process = subprocess.Popen([*map(str, command), cut], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not list(tmp_path.glob("cut.parquet.parts/*.parquet")) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not cut.exists()
    refused = subprocess.run([*map(str, command), cut], timeout=300, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "is unfinished; continue it with --resume" in refused.stderr
    done = subprocess.run([*map(str, command), cut, "--resume", "--json"], timeout=300, capture_output=True, check=True)
    assert 0 < json.loads(done.stdout)["computed"] < 2500
    assert cut.read_bytes() == straight.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.parquet*")) == ["cut.parquet", "straight.parquet"]
