"""Compute the parts of a table with Ray Data on all machines of a cluster.

Ray sees a data set with one row for each part: paths go in, the content of the part's file comes out. Only this process
writes files, so no two machines write the same. A task uses one core. If a machine is lost, another one computes its tasks.
The encoder is sent to all machines, so they have the same weights. The files must be at the same paths on all of them.
"""

import json
import logging
import os
import re
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from omni.loading.encoder import Encoder

from .batches import Task, embed_batch
from .engine import DType, Engine, EngineError
from .output import Document, Part, encode_part

if TYPE_CHECKING:
    import pyarrow as pa


class RayError(ValueError):
    """The cluster cannot do the work. The message is one sentence: what was expected and found, what to do."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to Ray: to the cluster at `address`, to one that this process has joined, or to this machine alone.

    Raises:
        RayError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise RayError(
            f'--engine ray needs Ray, which cannot be imported ({error}); pip install "omni-thinker[scale]".'
        ) from error
    if ray.is_initialized():
        yield
        return
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        if address and (named := re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)):
            socket.create_connection((named[1], int(named[2])), timeout=10).close()  # Ray would try for 20 minutes
        ray.init(**where, log_to_driver=False, logging_level="error")
    except (OSError, ValueError, RuntimeError) as error:
        raise RayError(
            f"No Ray cluster answers at {address!r} ({error}); start one with `ray start --head`."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def run(
    engine: Engine,
    task: Task,
    files: Sequence[str],
    parts: Sequence[Part],
    document: Document,
    advance: Callable[[int], None],
) -> Generator[tuple[Part, bytes]]:
    """Yield parts in the order in which they are finished; see `embed`.

    Raises:
        RayError: a machine does not find the files, or cannot compute the same as the engine of this process, or too
            many machines were lost.
    """
    import ray

    if not parts:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [
        {"number": number, "paths": [os.fsencode(path) for path in files[part.start : part.stop]]}
        for number, part in enumerate(parts)
    ]
    job = _Job(ray.put(engine.encoder), task, json.dumps(document), engine.path, engine.dtype, os.getcwd())
    computed = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _embed_part, batch_size=1, batch_format="pyarrow", fn_kwargs={"job": job}, num_cpus=1
    )
    try:
        for row in computed.iter_rows():
            if row["refused"] is not None:
                raise RayError(f"The machine {row['host']!r} cannot compute the same as this one: {row['refused']}")
            if stray := next((path for path in map(os.fsdecode, row["missing"]) if os.path.exists(path)), None):
                raise RayError(
                    f"The machine {row['host']!r} does not find {stray!r}, which this one has; mount the files under "
                    "the same path on all machines."
                )
            part = parts[row["number"]]
            advance(part.stop - part.start)
            yield part, row["data"]
    except ray.exceptions.RayTaskError:  # a bug; it has the traceback of the other machine
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise RayError(
            f"The cluster gave up ({reason}); check its machines, and then continue with --resume."
        ) from error


# --- On the machines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """The settings that all tasks share.

    Attributes:
        encoder: Ray's reference to the `Encoder`. Each process fetches it once.
        task: what to compute.
        document: the table's document, as JSON.
        path, dtype: the path and dtype of this process's engine, which the others must have, too.
        folder: the folder that relative paths start from.
    """

    encoder: Any
    task: Task
    document: str
    path: str
    dtype: DType
    folder: str


def _embed_part(row: "pa.Table", job: _Job) -> "pa.Table":
    """Turn a row of number and paths into a row of number and content, with the names of missing files.

    If the machine cannot compute it, the row has the reason and no content.
    """
    import pyarrow as pa

    with suppress(OSError):  # if this machine lacks the folder, its files are reported as missing
        os.chdir(job.folder)
    paths = [os.fsdecode(path) for path in row["paths"][0].as_py()]
    data, missing, refused = None, [], None
    try:
        engine = _engine(job)
    except EngineError as error:
        refused = str(error)
    else:
        batches = [embed_batch(engine, job.task, some) for some in job.task.batches(paths)]
        errors = [error for batch in batches for error in batch["error"].to_pylist()]
        unread = [path for path, error in zip(paths, errors, strict=True) if error is not None]
        data, missing = (
            encode_part(batches, json.loads(job.document)),
            [os.fsencode(path) for path in unread if not os.path.exists(path)],
        )
    columns = {
        "data": pa.array([data], pa.binary()),
        "missing": pa.array([missing], pa.list_(pa.binary())),
        "refused": pa.array([refused], pa.string()),
        "host": [socket.gethostname()],
    }
    return pa.table({"number": row["number"], **columns})


@lru_cache(maxsize=1)
def _engine(job: _Job) -> Engine:
    """An engine that computes the same as that of the driver.

    Raises:
        EngineError: this machine computes in another way.
    """
    import ray

    torch.set_num_threads(1)
    encoder: Encoder = ray.get(job.encoder)
    engine = Engine(encoder, job.task.what, job.task.precision, job.dtype)
    if engine.path != job.path:
        raise EngineError(
            f"expected the encoder {job.path!r}, found {engine.path!r}; use machines of one kind with the same packages."
        )
    return engine
