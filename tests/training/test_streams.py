"""Two processes of two workers each stream the same shards: every row once in an epoch, and the same when resumed."""

import io
import json
import shutil
import socket
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

RANK = Path(__file__).with_name("rank.py")
ROWS, BATCH, PROCESSES = 44, 2, 2
STEPS = ROWS // (BATCH * PROCESSES)  # of an epoch


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return buffer.getvalue()


def parquet(folder: Path) -> Path:
    """Row groups of three in files of 22 rows, so that the last group of each is smaller."""
    table = pa.table(
        {"image": [{"bytes": picture(), "path": None}] * ROWS, "caption": [str(number) for number in range(ROWS)]}
    )
    folder.mkdir()
    for start in range(0, ROWS, 22):
        pq.write_table(table.slice(start, 22), folder / f"{start}.parquet", row_group_size=3)
    return folder


def tars(folder: Path) -> Path:
    folder.mkdir()
    for start in range(0, ROWS, 22):
        with tarfile.open(folder / f"{start}.tar", "w") as file:
            for number in range(start, start + 22):
                for suffix, held in (("png", picture()), ("txt", str(number).encode())):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(held)
                    file.addfile(info, io.BytesIO(held))
    return folder


def lines(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_bytes(picture())
    rows = [{"image": "a.png", "caption": str(number)} for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


LAYOUTS: dict[str, Callable[[Path], Path]] = {"parquet": parquet, "tars": tars, "lines": lines}


@pytest.fixture
def learn(small: Path, python: Any, tmp_path: Path) -> Callable[..., list[list[list[Any]]]]:
    """`learn(train, *options)`: what each process notes in two epochs, [step, *answers] for each batch."""

    def run(train: dict[str, Any], *options: str) -> list[list[list[Any]]]:
        recipe = {
            "objective": "answers",
            "model": {"checkpoint": str(small / "omni")},
            "train": train,
            "optimizer": {"name": "adamw", "lr": 1e-3},
            "arguments": {
                "per_device_train_batch_size": BATCH,
                "num_train_epochs": 2,
                "save_strategy": "steps",
                "save_steps": STEPS + 4,
                "dataloader_num_workers": 2,
                "use_cpu": True,
                "report_to": "none",
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "seed": 5,
            },
            "output": str(tmp_path / "out"),
        }
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        notes = [tmp_path / f"notes-{rank}{''.join(options)}" for rank in range(PROCESSES)]

        def start(rank: int) -> subprocess.CompletedProcess[str]:
            ran: subprocess.CompletedProcess[str] = python(
                RANK, rank, PROCESSES, port, notes[rank], tmp_path / "recipe.json", *options
            )
            return ran

        with ThreadPoolExecutor(PROCESSES) as pool:
            for ran in pool.map(start, range(PROCESSES)):
                assert ran.returncode == 0, ran.stderr[-3000:]
        return [[json.loads(line) for line in each.read_text().splitlines()] for each in notes]

    return run


def stop_in_the_second_epoch(out: Path) -> None:
    """Leave what a run has written that is killed after the fourth step of its second epoch."""
    for path in out.iterdir():
        if path.name != "run":
            path.unlink()
    for checkpoint in (out / "run").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{STEPS + 4}":
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    "layout", ["parquet", *(pytest.param(name, marks=pytest.mark.long) for name in ("lines", "tars"))]
)
def test_two_processes_read_every_row_once_and_go_on_where_they_stopped(
    layout: str, learn: Callable[..., list[list[list[Any]]]], tmp_path: Path
) -> None:
    train = {"path": str(LAYOUTS[layout](tmp_path / layout))}
    whole = learn(train)
    epochs = []
    for epoch in range(2):
        read = [answers for each in whole for step, *answers in each if step // STEPS == epoch]
        assert Counter(sum(read, [])) == Counter(map(str, range(ROWS)))
        epochs.append(read)
    assert epochs[0] != epochs[1]
    stop_in_the_second_epoch(tmp_path / "out")
    resumed = learn(train, "--resume")
    assert resumed == [[note for note in each if note[0] >= STEPS + 4] for each in whole]


@pytest.mark.long
def test_two_processes_mix_by_weight_and_go_on_where_they_stopped(
    learn: Callable[..., list[list[list[Any]]]], tmp_path: Path
) -> None:
    """Three of four rows are of the shards, which have half of all rows; within 4 standard deviations."""
    chats = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}] * ROWS
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    shards = {"data": {"path": str(parquet(tmp_path / "parquet"))}, "weight": 3.0}
    train = {"sources": [shards, {"data": {"path": str(tmp_path / "chats.jsonl")}}]}
    whole = learn(train)
    counts = Counter(answer for each in whole for _, *answers in each for answer in answers)
    assert sum(counts.values()) == 4 * ROWS
    of_chats = counts.pop("yes")
    assert abs(of_chats - ROWS) < 4 * (4 * ROWS * 0.25 * 0.75) ** 0.5
    assert counts.keys() == set(map(str, range(ROWS)))
    stop_in_the_second_epoch(tmp_path / "out")
    resumed = learn(train, "--resume")
    assert resumed == [[note for note in each if note[0] >= STEPS + 4] for each in whole]
