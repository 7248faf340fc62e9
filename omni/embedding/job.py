"""Many pictures to a table of embeddings: what `omni embed` calls.

    report = embed(["photos"], "checkpoints/vision_tiny", "out.parquet")
    print(report.rows, report.unreadable)

Each thread takes a batch of files through all of it: reading, decoding, scaling, encoding. Nothing is handed from one
thread to another and torch keeps to the thread that calls it, so all cores are busy whichever part costs more, other
programs beside it cost their share and no more, and the rows do not depend on how many threads there are. What is written
when is the affair of `table`.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, computed_field

from omni.checkpoints.fingerprints import fingerprint_parts
from omni.loading.encoder import Encoder, load_encoder

from . import ray_engine
from .batches import Decode, Task, embed_batch
from .engine import Engine, Precision, What
from .sources import find_pictures
from .table import Document, Output, Part, TableError, default_part_rows, encode_part

if TYPE_CHECKING:
    import pyarrow as pa

Runner = Literal["local", "ray"]
"""This process, on all cores of this machine; or Ray Data, on all machines of a cluster."""


class Report(BaseModel):
    """What became of a job.

    Attributes:
        output: the file or folder.
        rows: of the table, one for each picture file.
        unreadable: how many of them have an error instead of an embedding.
        computed: how many were computed now; the others had been there.
        seconds: for these, without loading the encoder.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    rows: int
    unreadable: int
    computed: int
    seconds: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def files_per_second(self) -> float:
        """Of those that were computed now."""
        return round(self.computed / self.seconds, 1) if self.computed else 0.0


def embed(
    sources: Iterable[str | Path],
    checkpoint: str | Path,
    output: str | Path,
    *,
    what: What = "cls",
    precision: Precision = "float32",
    decode: Decode = "exact",
    batch_size: int = 32,
    shard_rows: int | None = None,
    resume: bool = False,
    runner: Runner = "local",
    address: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write a table with a row for each picture file, sorted by path; one that cannot be read has the reason in its row.

    Args:
        sources: folders, patterns, manifests; see `find_pictures`.
        checkpoint: folder of a vision encoder, see `load_encoder`, or of a fused model.
        output: a file whose name ends with .parquet, or a folder of such files.
        what: "cls" float32[D], "grid" float32[N, D], or "projected" float32[n, T], what a fused model hands its Thinker.
        precision: of the arithmetic; see `Engine`.
        decode: see `Decode`.
        batch_size: files that a thread reads and encodes together.
        shard_rows: rows of each file of a folder.
        resume: go on with a table that was begun before, of the same files, none of which was changed since, with the same
            weights, settings and arithmetic.
        runner: where it is computed.
        address: of a Ray cluster; without one Ray starts on this machine alone.
        threads: of this process, as many as it may use cores by default.
        progress: called with the number of rows that were computed, and of all.

    Raises:
        SourceError, ManifestError, CheckpointError, EngineError, RayError, TableError: nothing to do, nothing to do it
            with, or nowhere to put it; a file that cannot be read is no error.
    """
    files = find_pictures(sources)
    place = Output(output, resume)
    if place.single and shard_rows is not None:
        raise TableError(f"{str(output)!r} is to be one file; for files of {shard_rows:,} rows name a folder.")
    with _one_thread(), ray_engine.connected(address) if runner == "ray" else nullcontext():
        encoder = load_encoder(checkpoint)
        engine = Engine(encoder, what, precision)
        task = Task(what, engine.precision, decode, batch_size)
        shape = engine.shape[1:] if what == "cls" else engine.shape
        document = {
            "format": "omni embeddings 2",
            "omni": version("omni-thinker"),
            "checkpoint": str(checkpoint),
            **_hashes(encoder, what),
            **asdict(task),
            "engine": engine.path,
            "dtype": engine.dtype,
            "error": engine.error,
            "files_sha256": _sha256(part for path in files for part in _state(path)),
            "rows": len(files),
            "shard_rows": shard_rows or default_part_rows(shape, batch_size, place.single),
        }
        with place.open(document, files, shape) as table:
            start, missing = time.perf_counter(), table.missing()
            todo = sum(part.stop - part.start for part in missing)
            done = len(files) - todo

            def advance(rows: int) -> None:
                nonlocal done
                done += rows
                progress(done, len(files))

            advance(0)
            if runner == "local":
                results = _run(engine, task, files, missing, table.document, advance, threads or _cores())
            else:
                results = ray_engine.run(engine, task, files, missing, table.document, advance)
            with closing(results):
                for part, data in results:
                    table.add(part, data)
            seconds = time.perf_counter() - start
            unreadable = table.unreadable()
    return Report(output=str(output), rows=len(files), unreadable=unreadable, computed=todo, seconds=seconds)


def _run(
    engine: Engine,
    task: Task,
    files: Sequence[str],
    parts: Sequence[Part],
    document: Document,
    advance: Callable[[int], None],
    threads: int,
) -> Generator[tuple[Part, bytes]]:
    """Parts in order, each as soon as it is whole; the threads are no further ahead than keeps them busy."""
    work = (paths for part in parts for paths in task.batches(files[part.start : part.stop]))
    with ThreadPoolExecutor(threads) as pool, closing(_in_order(pool, engine, task, work, 2 * threads)) as rows:
        for part in parts:
            batches: list[pa.RecordBatch] = []
            while sum(map(len, batches)) < part.stop - part.start:
                batches.append(next(rows))
                advance(len(batches[-1]))
            yield part, encode_part(batches, document)


def _in_order(
    pool: ThreadPoolExecutor, engine: Engine, task: Task, work: Iterable[Sequence[str]], ahead: int
) -> Generator["pa.RecordBatch"]:
    waiting: deque[Future[pa.RecordBatch]] = deque()
    try:
        for paths in work:
            waiting.append(pool.submit(embed_batch, engine, task, paths))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _cores() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, operations of torch keep to the thread that calls them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- What the rows rest on --------------------------------------------------------------------------------------------


def _hashes(encoder: Encoder, what: What) -> dict[str, Any]:
    """Of weights, architecture and preprocessing. Fingerprints are those in the config.json of a checkpoint of omni."""
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    configurations = [encoder.model.config.to_dict()]
    if what == "projected" and encoder.fused is not None:
        projector = encoder.fused.image_projector.state_dict()
        weights |= {f"image_projector.{name}": tensor for name, tensor in projector.items()}
        configurations += [encoder.fused.config.modalities["image"]]
    return {
        "fingerprints": fingerprint_parts(weights),
        "architecture_sha256": _sha256(map(_canonical, configurations)),
        "preprocessing_sha256": _sha256([_canonical(encoder.image_processor.to_dict())]),
    }


def _state(path: str) -> Iterator[bytes]:
    """What a file is called and where it is, and what changes when it does; nothing is read."""
    yield os.fsencode(path)  # as it stands in the table
    yield os.fsencode(os.path.abspath(path))
    try:
        found = os.stat(path)
        yield b"%d %d" % (found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):
        yield b"-1"


def _canonical(values: dict[str, Any]) -> bytes:
    """The same for the same values, whatever their order, without notes on where they come from."""
    noted = ("_name_or_path", "architectures", "dtype", "fingerprints", "transformers_version", "encoder")
    values = {name: value for name, value in values.items() if name not in noted}
    return json.dumps(values, sort_keys=True, default=str).encode()


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()
