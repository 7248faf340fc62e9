"""Rows: a new process opens a data set of a million rows, reads the first and the last, and says how much memory it took.

Each contestant starts a process, so its time includes that of Python and of the import of `omni.data`. Memory is what the
process has more than after that import.
"""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.machine import ROOT
from benchmarks.measure import Call, Contestant, Race

READ = """
import re, sys
from omni.data.manifests import Manifest, ManifestConversations
import omni.vision.pictures

def peak():  # of this process alone, which `resource` does not tell
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = peak()
examples = ManifestConversations(Manifest.read(sys.argv[1]))
assert len(examples) == int(sys.argv[2])
assert examples[0].items["image"] and examples[len(examples) - 1].items["image"]
print(peak() - before)
"""


PEER = """
import sys
from datasets import load_dataset

rows = load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[2])
assert rows[0]["caption"] and rows[len(rows) - 1]["caption"]
"""


def races(quick: bool) -> Iterator[Race]:
    """One race, of the layouts beside `datasets`, which writes a copy of a JSONL file before it reads it."""
    rows = 1_000 if quick else 1_000_000
    with TemporaryDirectory() as folder:
        contestants = [
            Contestant(f"{name}, {rows:,} rows", partial(_build, make, Path(folder), rows), ours=True)
            for name, make in LAYOUTS.items()
        ]
        contestants.append(Contestant(f"datasets, JSONL, {rows:,} rows", partial(_peer, Path(folder), rows)))
        yield Race("a new process opens a data set", contestants, sample=0)


def _build(make: Callable[[Path, int], Path], folder: Path, rows: int) -> Call:
    path = make(folder, rows)
    return partial(_read, path, rows)


def _peer(folder: Path, rows: int) -> Call:
    path = lines(folder, rows)

    def read() -> None:
        with TemporaryDirectory() as cache:
            subprocess.run([sys.executable, "-c", PEER, str(path), cache], check=True, capture_output=True)

    return read


def _read(path: Path, rows: int) -> float:
    command = [sys.executable, "-c", READ, str(path), str(rows)]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    megabytes = float(found)
    sys.stderr.write(f"{path.name}: {megabytes:,.0f} MB more\n")
    return megabytes


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def lines(folder: Path, rows: int) -> Path:
    """A line of JSON for each row, all about one file."""
    (folder / "a.png").write_bytes(_picture())
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"image": "a.png", "caption": f"a red square, the {number}th of all"}) + "\n")
    return folder / "rows.jsonl"


def table(folder: Path, rows: int) -> Path:
    """The same as CSV."""
    (folder / "a.png").write_bytes(_picture())
    with (folder / "rows.csv").open("w") as file:
        file.write("image,caption\n")
        file.writelines(f'a.png,"a red square, the {number}th of all"\n' for number in range(rows))
    return folder / "rows.csv"


def parquet(folder: Path, rows: int) -> Path:
    """Row groups of a thousand rows that hold their pictures."""
    held: list[Any] = [{"bytes": _picture(), "path": None}] * 1000
    path = folder / "rows.parquet"
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1000):
            captions = [f"a red square, the {start + number}th of all" for number in range(1000)]
            writer.write_table(pa.table({"image": held, "caption": captions}, schema), row_group_size=1000)
    return path


def tars(folder: Path, rows: int) -> Path:
    """Files of webdataset with ten thousand samples each."""
    out = folder / "tars"
    out.mkdir()
    data = _picture()
    for start in range(0, rows, 10_000):
        with (out / f"{start:07}.tar").open("wb") as file:
            for number in range(start, min(start + 10_000, rows)):
                for suffix, held in (("png", data), ("txt", f"a red square, the {number}th of all".encode())):
                    info = tarfile.TarInfo(f"{number:07}.{suffix}")
                    info.size = len(held)
                    file.write(info.tobuf() + held.ljust(-(-len(held) // 512) * 512, b"\0"))
            file.write(bytes(1024))
    return out


def saved(folder: Path, rows: int) -> Path:
    """What `datasets` makes of the Parquet file."""
    from datasets import Dataset

    path = folder / "rows.parquet"
    made: Any = Dataset.from_parquet(str(path if path.is_file() else parquet(folder, rows)), cache_dir=str(folder))
    made.save_to_disk(folder / "saved")
    return folder / "saved"


LAYOUTS = {
    "JSONL": lines,
    "CSV": table,
    "Parquet": parquet,
    "webdataset": tars,
    "save_to_disk": saved,
}
