"""Turn many files into a table of embeddings: `omni embed`.

    summary = embed(["photos"], "checkpoints/vision_tiny", "out.parquet")
    print(summary.rows, summary.unreadable)

The rows are computed by the threads of this process (`local`) or by a cluster (`cluster`). `table` writes them.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field

from omni.checkpoints.fingerprints import fingerprint_parts
from omni.data.finding import find_files
from omni.loading.encoder import Encoder, load_encoder, modality_of

from . import cluster, local
from .batches import Decode, Task, columns
from .engine import Engine, EngineError, Precision, What
from .output import Output, default_part_rows
from .table import TableError

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
        modality: of a model with several encoders, the name of the one to use.
        normalize: divide each vector by its length.
        threads: number of threads. By default one for each core that this process may use.
        progress: called with the number of finished rows and the number of all rows.

    Raises:
        SourceError, ManifestError: the sources hold no file of this modality, or cannot be read.
        CheckpointError, EngineError: there is no encoder, or it cannot compute these tokens.
        RayError: the cluster cannot do the work.
        TableError: the output cannot be written or continued.
    """
    bundle = modality_of(checkpoint, modality)
    files = find_files(sources, bundle)
    place = Output(output, resume)
    if place.single and shard_rows is not None:
        raise TableError(f"{str(output)!r} names one file; for files of {shard_rows:,} rows name a folder.")
    with local.one_thread(), cluster.connected(address) if runner == "ray" else nullcontext():
        encoder = load_encoder(checkpoint, bundle.name)
        engine = Engine(encoder, what, precision)
        if decode == "scaled" and not engine.scales():
            raise EngineError(f"Files of {bundle.noun}s are read whole; leave `scaled` out.")
        task = Task(what, engine.precision, decode, batch_size, normalize)
        shape = columns(engine)
        rows_in_part = shard_rows or default_part_rows((engine.longest, engine.shape[1]), batch_size, place.single)
        document = _describe(checkpoint, encoder, engine, task, files) | {"shard_rows": rows_in_part}
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
                results = local.run(engine, task, files, missing, table.document, advance, threads)
            else:
                results = cluster.run(engine, task, files, missing, table.document, advance)
            with closing(results):
                for part, data in results:
                    table.add(part, data)
            seconds = time.perf_counter() - start
            unreadable = table.unreadable()
    return EmbeddingSummary(output=str(output), rows=len(files), unreadable=unreadable, computed=todo, seconds=seconds)


def _describe(
    checkpoint: str | Path, encoder: Encoder, engine: Engine, task: Task, files: Sequence[str]
) -> dict[str, Any]:
    """The document of a table: everything that its rows depend on."""
    return {
        "format": "omni embeddings 2",
        "omni": version("omni-thinker"),
        "checkpoint": str(checkpoint),
        "modality": encoder.modality,
        **hashes(encoder, task.what),
        **asdict(task),
        "dtype": engine.dtype,
        "engine": engine.path,  # it may follow from dtype, so it is compared after it
        "error": engine.error,
        "files_sha256": _sha256(part for path in files for part in _state(path)),
        "rows": len(files),
    }


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
