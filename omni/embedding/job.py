"""Turn many files into a table of embeddings: `omni embed`.

    summary = embed(["photos"], "checkpoints/vision_tiny", "out.parquet")
    print(summary.rows, summary.unreadable)

Each thread takes a batch of files through all steps: read, decode, resize, encode. No thread waits for another, and torch
uses only the thread that calls it. So all cores are busy, whichever step is the slowest, and the rows do not depend on the
number of threads. `table` writes the rows.
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
from omni.data.finding import find_files
from omni.loading.encoder import Encoder, load_encoder, modality_of

from . import cluster
from .batches import Decode, Task, columns, embed_batch
from .engine import Engine, EngineError, Precision, What
from .table import Document, Output, Part, TableError, default_part_rows, encode_part

if TYPE_CHECKING:
    import pyarrow as pa

Runner = Literal["local", "ray"]
"""Where the rows are computed: by this process on all cores, or by Ray Data on all machines of a cluster."""


class EmbeddingSummary(BaseModel):
    """The numbers of one run of `embed`.

    Attributes:
        output: the file or folder.
        rows: number of rows of the table, one for each file.
        unreadable: number of rows with an error in place of an embedding.
        computed: number of rows that this run computed. An earlier run computed the others.
        seconds: time to compute them, without loading the encoder.
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
        """Rows that this run computed, per second."""
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
    modality: str | None = None,
    normalize: bool = False,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EmbeddingSummary:
    """Write a table with one row for each file of the encoder's modality, sorted by path.

    The row of a file that cannot be read says why.

    Args:
        sources: folders, patterns, manifests; see `find_files`.
        checkpoint: folder of an encoder or of a fused model; see `load_encoder`.
        output: a file whose name ends with .parquet, or a folder of such files.
        what: "cls" float32[D], "grid" float32[N, D], or "projected" float32[n, T], the tokens for a fused model's Thinker.
            Where items differ in length, so do N and n.
        precision: precision of the arithmetic; see `Engine`.
        decode: see `Decode`.
        batch_size: number of files that a thread reads and encodes at once.
        shard_rows: number of rows in each file of a folder.
        resume: continue an unfinished table. Its files must be the same and unchanged; weights, settings and arithmetic
            must be the same, too.
        runner: where the rows are computed.
        address: address of a Ray cluster. Without one, Ray starts on this machine alone.
        modality: of a model with several encoders, the name of the one that is meant.
        normalize: divide each vector by its length.
        threads: number of threads. By default one for each core that this process may use.
        progress: called with the number of finished rows and the number of all rows.

    Raises:
        SourceError, ManifestError: the sources hold no file of this modality, or cannot be read.
        CheckpointError, EngineError: there is no encoder, or it cannot compute what is asked for.
        RayError: the cluster cannot do the work.
        TableError: the output cannot be written or continued.
    """
    bundle = modality_of(checkpoint, modality)
    files = find_files(sources, bundle)
    place = Output(output, resume)
    if place.single and shard_rows is not None:
        raise TableError(f"{str(output)!r} is to be one file; for files of {shard_rows:,} rows name a folder.")
    with _one_thread(), cluster.connected(address) if runner == "ray" else nullcontext():
        encoder = load_encoder(checkpoint, bundle.name)
        engine = Engine(encoder, what, precision)
        if decode == "scaled" and not engine.scales():
            raise EngineError(f"Files of {bundle.noun}s are read whole; leave `scaled` out.")
        task = Task(what, engine.precision, decode, batch_size, normalize)
        shape = columns(engine)
        document = {
            "format": "omni embeddings 2",
            "omni": version("omni-thinker"),
            "checkpoint": str(checkpoint),
            "modality": bundle.name,
            **hashes(encoder, what),
            **asdict(task),
            "engine": engine.path,
            "dtype": engine.dtype,
            "error": engine.error,
            "files_sha256": _sha256(part for path in files for part in _state(path)),
            "rows": len(files),
            "shard_rows": shard_rows or default_part_rows((engine.longest, engine.shape[1]), batch_size, place.single),
        }
        with place.open(document, files, shape, engine.sized) as table:
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
                results = cluster.run(engine, task, files, missing, table.document, advance)
            with closing(results):
                for part, data in results:
                    table.add(part, data)
            seconds = time.perf_counter() - start
            unreadable = table.unreadable()
    return EmbeddingSummary(output=str(output), rows=len(files), unreadable=unreadable, computed=todo, seconds=seconds)


def _run(
    engine: Engine,
    task: Task,
    files: Sequence[str],
    parts: Sequence[Part],
    document: Document,
    advance: Callable[[int], None],
    threads: int,
) -> Generator[tuple[Part, bytes]]:
    """Yield parts in order, each as soon as it is complete. The threads compute a bounded number of batches ahead."""
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
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Make torch use one thread for each operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- What the rows depend on ------------------------------------------------------------------------------------------


def hashes(encoder: Encoder, what: What) -> dict[str, Any]:
    """Hashes of weights, architecture and preprocessing. Fingerprints are those in a config.json of omni."""
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    configurations = [encoder.model.config.to_dict()]
    if what == "projected" and encoder.fused is not None:
        part = f"{encoder.modality}_projector"
        weights |= {f"{part}.{name}": tensor for name, tensor in getattr(encoder.fused, part).state_dict().items()}
        configurations += [encoder.fused.config.modalities[encoder.modality]]
    return {
        "fingerprints": fingerprint_parts(weights),
        "architecture_sha256": _sha256(map(_canonical, configurations)),
        "preprocessing_sha256": _sha256([_canonical(encoder.preprocessor.to_dict())]),
    }


def _state(path: str) -> Iterator[bytes]:
    """The path, size and time of change of a file. The file is not read."""
    yield os.fsencode(path)  # as in the table
    yield os.fsencode(os.path.abspath(path))
    try:
        found = os.stat(path)
        yield b"%d %d" % (found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):
        yield b"-1"


def _canonical(values: dict[str, Any]) -> bytes:
    """JSON that is equal for equal settings, whatever their order. Names and versions are left out."""
    noted = ("_name_or_path", "architectures", "dtype", "fingerprints", "transformers_version", "encoder")
    values = {name: value for name, value in values.items() if name not in noted}
    return json.dumps(values, sort_keys=True, default=str).encode()


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()
