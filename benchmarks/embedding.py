"""Files to embeddings by omni's engine, for the jobs about files of pictures and of sounds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import Call
from omni.embedding import local
from omni.embedding.batches import Decode, Task
from omni.embedding.engine import Engine, Precision
from omni.embedding.output import Part
from omni.loading.encoder import load_encoder


def by_engine(checkpoint: Path, paths: Sequence[str], batch: int, precision: Precision = "float32") -> Call:
    """Reads a batch, then encodes it, so that each step has the processor to itself: CLS tokens float[n, D]."""
    engine = Engine(load_encoder(checkpoint), what="cls", precision=precision)

    def embed() -> torch.Tensor:
        found = []
        for start in range(0, len(paths), batch):
            found += engine([engine.prepare(engine.read(path)[0]) for path in paths[start : start + batch]])
        return torch.from_numpy(np.concatenate(found))

    return embed


def by_omni_embed(
    checkpoint: Path, paths: Sequence[str], batch: int, precision: Precision = "float32", decode: Decode = "exact"
) -> Call:
    """Does what `omni embed` does with files, to the bytes of its table: CLS tokens float[n, D].

    The encoder is loaded before, as those of the peers are.
    """
    engine = Engine(load_encoder(checkpoint), what="cls", precision=precision)
    task, whole = Task("cls", precision, decode, batch), [Part(0, 0, len(paths))]

    def embed() -> torch.Tensor:
        with local.one_thread():
            ((_, rows),) = local.run(engine, task, paths, whole, {}, lambda rows: None)
        column = pq.read_table(pa.BufferReader(rows))["embedding"].combine_chunks()
        return torch.from_numpy(column.flatten().to_numpy(zero_copy_only=False).reshape(len(paths), -1).copy())

    return embed
