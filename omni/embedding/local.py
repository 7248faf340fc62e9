"""Computes the rows of a table by the threads of this process.

Each thread takes a batch of files through all steps: read, decode, resize, encode. No thread waits for another, and torch
uses only the thread that calls it. So all cores are busy, whichever step is the slowest, and the rows do not depend on the
number of threads.
"""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch

from .batches import Task, embed_batch
from .engine import Engine
from .output import Document, Part, encode_part

if TYPE_CHECKING:
    import pyarrow as pa


def run(
    engine: Engine,
    task: Task,
    files: Sequence[str],
    parts: Sequence[Part],
    document: Document,
    advance: Callable[[int], None],
    threads: int | None = None,
) -> Generator[tuple[Part, bytes]]:
    """Yield parts in order, each as soon as it is complete; see `embed`. `threads` is by default one for each core."""
    threads = threads or cores()
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
    """The rows of each batch of files, in order. The threads compute at most `ahead` batches in advance."""
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


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context, torch uses one thread for each operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
