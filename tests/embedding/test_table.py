"""A table survives a kill at any moment: its parts are whole, missing ones are known, and the result is the same."""

import os
import random
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omni.embedding import output as module
from omni.embedding.columns import record_batch
from omni.embedding.output import Output, Part, Table, default_part_rows, encode_part
from omni.embedding.table import TableError, describe

SHAPES = {"cls": (3,), "grid": (2, 3)}


def document(rows: int, **changes: Any) -> dict[str, Any]:
    return {"weights": "abc", "checkpoint": "here", "error": 1e-6, "rows": rows, "shard_rows": 4, **changes}


def paths(rows: int) -> list[str]:
    return [f"{number:04}" for number in range(rows)]


def data(part: Part, shape: tuple[int, ...], job: dict[str, Any]) -> bytes:
    """Rows that say which they are; every seventh cannot be read."""
    numbers = range(part.start, part.stop)
    errors = [None if number % 7 else f"row {number} is bad" for number in numbers]
    sizes = [(number, 2 * number) if number % 7 else None for number in numbers]
    values = np.arange(part.start * 6, part.stop * 6, dtype=np.float32).reshape(-1, 2, 3)
    batch = record_batch(
        [f"{number:04}" for number in numbers],
        sizes,
        errors,
        [None] * len(numbers),
        [
            None if error else row[: shape[0] if len(shape) > 1 else 1]
            for error, row in zip(errors, values, strict=True)
        ],
        shape,
    )
    return encode_part([batch.slice(0, 3), batch.slice(3)], job)


def fill(table: Table, shape: tuple[int, ...], most: int | None = None) -> int:
    parts = table.missing()[:most]
    for part in parts:
        table.add(part, data(part, shape, dict(table.document)))
    return len(parts)


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("what", SHAPES)
def test_a_table_is_what_was_put_into_it(what: str, tmp_path: Path) -> None:
    shape, path = SHAPES[what], tmp_path / "out.parquet"
    with Output(path).open(document(50, shard_rows=8), paths(50), shape) as table:
        assert [(p.start, p.stop) for p in table.missing()] == [(s, min(s + 8, 50)) for s in range(0, 50, 8)]
        fill(table, shape)
        assert table.unreadable() == 8
    found = pq.read_table(path)
    assert found.num_rows == 50
    assert [field.name for field in found.schema] == ["path", "width", "height", "error", "note", "embedding"]
    inner = pa.list_(pa.float32(), 3)
    assert found.schema.field("embedding").type == (inner if what == "cls" else pa.list_(inner, 2))
    rows = found.to_pylist()
    assert rows[0] == {
        "path": "0000",
        "width": None,
        "height": None,
        "error": "row 0 is bad",
        "note": None,
        "embedding": None,
    }
    assert rows[8]["embedding"] == ([48, 49, 50] if what == "cls" else [[48, 49, 50], [51, 52, 53]])
    assert (rows[8]["path"], rows[8]["width"], rows[8]["height"], rows[8]["error"]) == ("0008", 8, 16, None)
    assert describe(path) == document(50, shard_rows=8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.parquet"]


def test_parts_may_come_in_any_order(tmp_path: Path) -> None:
    for name, step in (("forwards", 1), ("backwards", -1)):
        with Output(tmp_path / name).open(document(50, shard_rows=20), paths(50), (3,)) as table:
            for part in table.missing()[::step]:
                table.add(part, data(part, (3,), document(50, shard_rows=20)))
    one, other = (sorted((tmp_path / name).iterdir()) for name in ("forwards", "backwards"))
    assert [path.name for path in one] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
    assert [pq.read_metadata(path).num_rows for path in one] == [20, 20, 10]
    assert [row["path"] for row in read(tmp_path / "forwards")] == [f"{n:04}" for n in range(50)]
    assert describe(tmp_path / "forwards") == document(50, shard_rows=20)


class Killed(BaseException):
    """An exception that no handler expects."""


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_stopped_at_every_single_step_on_the_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that changes a file may be the last one of a process; the next process continues."""
    steps, last = 0, -1

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == last:
                raise Killed
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(lambda descriptor: None))
    monkeypatch.setattr(os, "unlink", counted(os.unlink))
    monkeypatch.setattr(module.shutil, "rmtree", counted(module.shutil.rmtree))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))

    def work(folder: Path) -> int:
        with Output(folder / name, resume=True).open(document(30), paths(30), (3,)) as table:
            return fill(table, (3,))

    def files(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    (tmp_path / "whole").mkdir()
    steps = 0
    assert work(tmp_path / "whole") == 8
    total = steps
    assert total > 18
    for step in range(1, total + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        steps, last = 0, step
        with pytest.raises(Killed):
            work(folder)
        steps, last = 0, -1
        work(folder)
        assert files(folder) == files(tmp_path / "whole"), step


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_what_was_computed_is_not_computed_again(name: str, tmp_path: Path) -> None:
    path, job = tmp_path / name, document(50, shard_rows=20)
    with pytest.raises(Killed), Output(path).open(job, paths(50), (3,)) as table:
        fill(table, (3,), 1)
        raise Killed
    assert [part.name for part in tmp_path.rglob("part-*.parquet")] == ["part-00000.parquet"]
    with Output(path, resume=True).open(job, paths(50), (3,)) as table:
        assert [part.start for part in table.missing()] == [20, 40]
        fill(table, (3,))
    with Output(path, resume=True).open(job, paths(50), (3,)) as table:
        assert table.missing() == []
        assert table.unreadable() == 8
    if path.is_dir():
        (path / "part-00001.parquet").unlink()
        with Output(path, resume=True).open(job, paths(50), (3,)) as table:
            assert {part.number for part in table.missing()} == {1}
            fill(table, (3,))
    assert [row["path"] for row in read(path)] == paths(50)


def stopped(path: Path) -> list[Path]:
    """A table of 40 rows that was killed before its last part; its other parts."""
    with suppress(Killed), Output(path).open(document(40, shard_rows=10), paths(40), (3,)) as table:
        fill(table, (3,), 3)
        raise Killed
    return sorted(path.parent.rglob("part-*.parquet"))


def go_on(path: Path) -> None:
    with Output(path, resume=True).open(document(40, shard_rows=10), paths(40), (3,)) as table:
        fill(table, (3,))


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_parts_that_changed_places_are_named(name: str, tmp_path: Path) -> None:
    first, second, _ = stopped(tmp_path / name)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(
        TableError, match="holds the rows of other files than belong there; move it elsewhere"
    ) as caught:
        go_on(tmp_path / name)
    assert repr(str(first)) in str(caught.value)


def test_a_flipped_bit_in_a_part_changes_no_row(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    stopped(tmp_path / "whole" / "out.parquet")
    go_on(tmp_path / "whole" / "out.parquet")
    expected = pq.read_table(tmp_path / "whole" / "out.parquet")
    parts = stopped(tmp_path / "cut" / "out.parquet")
    draw, refused = random.Random(0), 0
    for _ in range(150):
        part = draw.choice(parts)
        content = part.read_bytes()
        place = draw.randrange(len(content))
        part.write_bytes(content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :])
        error = None
        try:
            go_on(tmp_path / "cut" / "out.parquet")
        except TableError as found:
            error = found
        if error is not None:
            assert repr(str(part)) in str(error)
            refused += 1
        else:  # where it lies nobody reads
            assert pq.read_table(tmp_path / "cut" / "out.parquet").equals(expected)
            (tmp_path / "cut" / "out.parquet").unlink()
            assert stopped(tmp_path / "cut" / "out.parquet") == parts
        part.write_bytes(content)
    assert refused > 100


def refusal(path: Path, resume: bool = False, **changes: Any) -> str:
    with (
        pytest.raises(TableError) as caught,
        Output(path, resume).open(document(8, **changes), paths(8), (3,)) as table,
    ):
        fill(table, (3,))
    message = str(caught.value)
    assert message.count("\n") == 0
    assert message.endswith(".")
    assert repr(str(path)) in message
    return message


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "table.parquet").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.png").touch()
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").touch()
    for name in ("table.parquet", "folder"):
        assert "exists already and is not replaced" in refusal(tmp_path / name)
        assert "is not a table that `omni embed` wrote" in refusal(tmp_path / name, resume=True)
    assert "is a folder, expected a file" in refusal(tmp_path / "folder.parquet")
    assert "is a file, expected a folder, or a name that ends with .parquet" in refusal(tmp_path / "file")
    assert "its folder does not exist" in refusal(tmp_path / "nowhere" / "out.parquet")
    assert (tmp_path / "table.parquet").read_bytes() == b"mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.png"]


@pytest.mark.parametrize("name", ["out.parquet", "out"])
@pytest.mark.parametrize("complete", [False, True])
def test_only_the_same_table_is_continued(name: str, complete: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    if complete:
        with Output(path).open(document(8), paths(8), (3,)) as table:
            fill(table, (3,))
    else:
        with pytest.raises(Killed), Output(path).open(document(8), paths(8), (3,)) as table:
            fill(table, (3,), 1)
            raise Killed
    assert ("exists already" if complete else "is unfinished; continue it") in refusal(path)
    assert "was begun with weights 'abc', found 'def' now" in refusal(path, resume=True, weights="def")
    elsewhere = document(8, checkpoint="there", error=2e-6)  # the same weights in another folder, on another processor
    with Output(path, resume=True).open(elsewhere, paths(8), (3,)) as table:
        fill(table, (3,))
    assert describe(path) == document(8)


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_finished_table_stays_finished_when_another_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with Output(path).open(document(8, files_sha256="abc"), paths(8), (3,)) as table:
        fill(table, (3,))
    before = sorted(tmp_path.rglob("*"))
    found = refusal(path, resume=True, files_sha256="def")
    assert "was begun with other files than those found now, or some were changed since; restore those" in found
    assert sorted(tmp_path.rglob("*")) == before
    assert "exists already" in refusal(path)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("size", [0, 500])
def test_a_part_that_is_damaged_is_named_and_made_again(size: int, finished: bool, number: int, tmp_path: Path) -> None:
    path = tmp_path / "out"
    stopped(path)
    if finished:
        go_on(path)
    whole = {part.name: part.read_bytes() for part in path.glob("*.parquet")}
    part = path / f"part-{number:05}.parquet"
    part.write_bytes(whole[part.name][:size])
    with pytest.raises(TableError, match=r"remove it, and --resume makes it again") as caught:
        go_on(path)
    assert repr(str(part)) in str(caught.value)
    part.unlink()
    go_on(path)
    found = {part.name: part.read_bytes() for part in path.iterdir()}
    assert {name: found[name] for name in whole} == whole
    assert len(found) == 4


def test_a_file_of_another_table_is_named(tmp_path: Path) -> None:
    for name, weights in (("one", "abc"), ("other", "def")):
        with Output(tmp_path / name).open(document(20, shard_rows=10, weights=weights), paths(20), (3,)) as table:
            fill(table, (3,))
    strange = tmp_path / "one" / "part-00001.parquet"
    strange.write_bytes((tmp_path / "other" / "part-00001.parquet").read_bytes())
    with (
        pytest.raises(TableError, match="is of another table, which has another weights; move it elsewhere") as caught,
        Output(tmp_path / "one", resume=True).open(document(20, shard_rows=10), paths(20), (3,)),
    ):
        pass
    assert repr(str(strange)) in str(caught.value)


def test_names_that_the_system_does_not_take(tmp_path: Path) -> None:
    for length in (250, 300):
        for suffix in ("", ".parquet"):
            path = tmp_path / ("x" * (length - len(suffix)) + suffix)
            if suffix or length > 255:
                assert "cannot be written: the system says 'File name too long'; name another output." in refusal(path)


def test_the_suffix_counts_in_large_letters_too(tmp_path: Path) -> None:
    with Output(tmp_path / "OUT.PARQUET").open(document(8), paths(8), (3,)) as table:
        fill(table, (3,))
    assert (tmp_path / "OUT.PARQUET").is_file()
    assert len(read(tmp_path / "OUT.PARQUET")) == 8


def test_no_two_files_have_the_same_path() -> None:
    plain = ["a b.png", "täßt-图片.png", "line\nbreak.png", "udcff.png"]
    raw = [b"\xff.png", rb"\udcff.png", rb"\\udcff.png", b"\\\xff.png", rb"a\b", rb"a\\b", b"\\", b"\xff\\"]
    paths = [*plain, *map(os.fsdecode, raw)]
    found = record_batch(paths, *[[None] * len(paths)] * 3, list(np.zeros((len(paths), 1, 3), np.float32)), (3,))[
        "path"
    ]
    assert found.to_pylist()[:4] == plain
    assert found.to_pylist()[4:6] == [r"\udcff.png", r"\\udcff.png"]

    def back(written: str) -> str:
        return re.sub(r"\\(?:\\|udc(..))", lambda one: chr(0xDC00 + int(one[1], 16)) if one[1] else "\\", written)

    assert [back(path) for path in found.to_pylist()] == paths


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Output(tmp_path / "out").open(document(8), paths(8), (3,)) as table:
        fill(table, (3,))
    assert len(read(tmp_path / "out")) == 8


def test_two_processes_do_not_write_one_table(tmp_path: Path) -> None:
    path = tmp_path / "out.parquet"
    with Output(path).open(document(8), paths(8), (3,)) as table:
        assert "is being written by another process" in refusal(path, resume=True)
        fill(table, (3,))
    assert len(read(path)) == 8


def test_a_full_disk_is_reported_and_the_table_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.parquet"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "the system says 'No space left on device'" in refusal(path)
    with Output(path, resume=True).open(document(8), paths(8), (3,)) as table:
        fill(table, (3,))
    assert len(read(path)) == 8


def test_parts_are_bounded_in_rows_and_in_bytes() -> None:
    assert default_part_rows((128,), 32, single=True) == 1024
    assert default_part_rows((196, 128), 32, single=True) == 160
    assert default_part_rows((128,), 48, single=True) == 1008
    assert default_part_rows((128,), 5000, single=True) == 5000
    assert default_part_rows((128,), 32, single=False) == 9984
    assert default_part_rows((196, 128), 32, single=False) == 1312
