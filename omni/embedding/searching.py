"""Search a table of embeddings: for files like a file, for files that fit a text, for duplicates.

    hits = search("out.parquet", like="wren.jpg")       # [Hit(path="photos/7.jpg", similarity=0.93), ...]
    groups = duplicates("out.parquet", least=0.98)      # [[Hit(...), Hit(...)], ...]

Similarity is the cosine of two vectors. Below `EXACT` rows all of them are compared; a table is read part by part, so
memory does not grow with it. From there on an index of usearch (extra `[search]`) finds nearly all neighbours; it is built
once and kept beside the table. A search by text always compares all rows.

A table knows the encoder that made it. A file is encoded by that encoder alone; another one is refused.
"""

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from omni.loading.encoder import Encoder, load_encoder
from omni.loading.text import load_text

from .columns import original
from .engine import Engine
from .job import hashes
from .table import TableError, describe, read_vectors, table_files

if TYPE_CHECKING:
    from usearch.index import Index

EXACT = 1_000_000
"""A table of this many rows or more is searched by an index."""

NEIGHBOURS = 64
"""The number of neighbours of each row that an index gives for duplicates."""

BLOCK = 4096
"""The number of rows that are compared with others at once."""

_NEEDED = {"what": str, "rows": int, "precision": str, "dtype": str, "checkpoint": str}
"""What a search reads in the document of a table."""

Vectors = NDArray[np.float32]


class SearchError(ValueError):
    """A search that cannot be done. The message is one sentence: what was expected and found, what to do."""


class Hit(BaseModel):
    """A row of a table.

    Attributes:
        path: the file, as the table writes it.
        similarity: cosine with what was searched for, or with the first of a group: 1 is the same direction.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    similarity: float

    @property
    def file(self) -> Path:
        """The file."""
        return Path(original(self.path))


@dataclass(frozen=True)
class SearchTable:
    """A table of one vector for each file.

    Attributes:
        path: the file or folder.
        document: what its rows depend on.
    """

    path: Path
    document: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> "SearchTable":
        """Open a table.

        Raises:
            TableError: there is none.
            SearchError: it holds several vectors for each file.
        """
        document = describe(path)
        if lacking := [name for name, kind in _NEEDED.items() if type(document.get(name)) is not kind]:
            raise TableError(
                f"{str(path)!r} does not say its {lacking[0]}, so it is no table that `omni embed` wrote; embed the files "
                "again."
            )
        if document["what"] != "cls":
            raise SearchError(
                f"{str(path)!r} holds {document['what']!r}, expected one vector for each file; embed them with --what cls."
            )
        return cls(Path(path), document)

    @property
    def modality(self) -> str | None:
        """The name of the modality of its files."""
        return self.document.get("modality")

    def __len__(self) -> int:
        return int(self.document["rows"])

    def parts(self) -> Iterator[tuple[list[str], Vectors]]:
        """The paths and unit vectors float32[n, D] of rows that have one, part by part."""
        for paths, vectors in self._rows():
            yield paths, unit(vectors)

    def _rows(self) -> Iterator[tuple[list[str], Vectors]]:
        for file in table_files(self.path):
            yield from read_vectors(file)

    def encoder(self, checkpoint: str | Path | None = None) -> Encoder:
        """The encoder that made the table.

        Args:
            checkpoint: its folder; by default the folder of then.

        Raises:
            CheckpointError: it cannot be loaded.
            SearchError: it is another encoder.
        """
        folder = self._folder(checkpoint)
        encoder = load_encoder(folder, self.modality)
        if differing := [name for name, value in hashes(encoder, "cls").items() if self.document.get(name) != value]:
            what = {"fingerprints": "weights", "architecture_sha256": "architecture"}.get(differing[0], "preprocessing")
            raise SearchError(
                f"{str(self.path)!r} was made by another encoder than that in {str(folder)!r}, which has other {what}; name "
                "the right one with --checkpoint, or embed the files again."
            )
        return encoder

    def encode(self, file: str | Path, checkpoint: str | Path | None = None) -> Vectors:
        """The unit vector float32[D] of a file.

        Raises:
            CheckpointError, SearchError: see `encoder`.
            ItemError: the file cannot be read.
        """
        engine = Engine(self.encoder(checkpoint), "cls", self.document["precision"], self.document["dtype"])
        item, _, _ = engine.read(str(file), None)
        return unit(engine([engine.prepare(item)])[0])[0]

    def _folder(self, checkpoint: str | Path | None) -> Path:
        folder = Path(checkpoint or self.document["checkpoint"])
        if checkpoint is None and not folder.is_dir():
            raise SearchError(
                f"{str(self.path)!r} was made by the encoder in {str(folder)!r}, which is not there; name its folder with "
                "--checkpoint."
            )
        return folder


def unit(vectors: Vectors) -> Vectors:
    """Vectors float32[n, D] of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def search(
    table: str | Path,
    *,
    like: str | Path | None = None,
    text: str | None = None,
    most: int = 10,
    checkpoint: str | Path | None = None,
) -> list[Hit]:
    """The rows that are most like a file, or that fit a text best, in order.

    Args:
        table: what `embed` wrote.
        like: a file of the table's modality; it may be in the table itself.
        text: a text, where the encoder was trained beside a text encoder (objective "contrastive").
        most: number of rows.
        checkpoint: the folder of the encoder, by default where it was when the table was made.

    Raises:
        TableError: there is no such table, or it is damaged.
        SearchError: neither or both of `like` and `text`; another encoder.
        CheckpointError: the encoder cannot be loaded, or there is no text encoder beside it.
        ItemError: the file cannot be read.
    """
    if (like is None) == (text is None):
        raise SearchError("Expected either a file or a text to search for; give one of them.")
    opened = SearchTable.open(table)
    if like is not None:
        wanted, projection = opened.encode(like, checkpoint), None
        if len(opened) >= EXACT:
            return _ask_index(opened, wanted, most)
    else:
        assert text is not None
        wanted, projection = _of_text(opened, text, checkpoint)
    best: list[tuple[float, int, str]] = []  # a heap: the worst of the best is first
    number = 0
    for paths, vectors in opened.parts():
        rows = vectors if projection is None else unit(vectors @ projection.T)
        similar = rows @ wanted
        for place in np.argsort(-similar, kind="stable")[:most].tolist():
            entry = (float(similar[place]), -(number + place), paths[place])
            if len(best) < most:
                heapq.heappush(best, entry)
            elif entry > best[0]:
                heapq.heapreplace(best, entry)
        number += len(paths)
    return [Hit(path=path, similarity=similarity) for similarity, _, path in sorted(best, reverse=True)]


def _of_text(table: SearchTable, text: str, checkpoint: str | Path | None) -> tuple[Vectors, Vectors]:
    """The unit vector float32[P] of a text, and the projection float32[P, D] of the table's vectors to its space."""
    encoder = table.encoder(checkpoint)
    reader = load_text(table._folder(checkpoint), encoder)
    return unit(reader.embed([text]))[0], reader.projection


# --- Duplicates -------------------------------------------------------------------------------------------------------


def duplicates(table: str | Path, least: float = 0.98) -> list[list[Hit]]:
    """Groups of rows that are nearly the same, each in the order of the table.

    Two rows whose similarity is at least `least` are in one group, and so are all rows that a chain of such pairs connects.

    Raises:
        TableError: there is no such table, or it is damaged.
        SearchError: it holds several vectors for each file, or `usearch` is needed and not installed.
    """
    opened = SearchTable.open(table)
    paths, vectors = _all(opened)
    group = list(range(len(paths)))

    def first_of(row: int) -> int:
        while group[row] != row:
            group[row] = row = group[group[row]]
        return row

    for one, other in _pairs(opened, vectors, least):
        first, second = sorted((first_of(one), first_of(other)))
        group[second] = first
    groups: dict[int, list[int]] = {}
    for row in range(len(paths)):
        groups.setdefault(first_of(row), []).append(row)
    return [
        [Hit(path=paths[row], similarity=min(float(vectors[rows[0]] @ vectors[row]), 1.0)) for row in rows]
        for rows in groups.values()
        if len(rows) > 1
    ]


def _all(table: SearchTable) -> tuple[list[str], Vectors]:
    paths, parts = list[str](), list[Vectors]()
    for some, vectors in table.parts():
        paths += some
        parts.append(vectors)
    return paths, np.concatenate(parts) if parts else np.zeros((0, 1), np.float32)


def _pairs(table: SearchTable, vectors: Vectors, least: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows that are similar enough."""
    if len(vectors) >= EXACT:
        index = _index(table)
        for start in range(0, len(vectors), BLOCK):
            found: Any = index.search(vectors[start : start + BLOCK], min(NEIGHBOURS, len(vectors)))
            there = np.arange(found.keys.shape[1]) < found.counts[:, None]  # the rest of a row is unused
            rows, places = np.nonzero(there & (np.where(there, found.distances, np.inf) <= 1 - least))
            yield from zip((start + rows).tolist(), found.keys[rows, places].astype(int).tolist(), strict=True)
        return
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        for other in range(start, len(vectors), BLOCK):
            rows, columns = np.nonzero(block @ vectors[other : other + BLOCK].T >= least)
            yield from zip((start + rows).tolist(), (other + columns).tolist(), strict=True)


# --- Large tables -----------------------------------------------------------------------------------------------------


def _ask_index(table: SearchTable, wanted: Vectors, most: int) -> list[Hit]:
    found = _index(table).search(wanted, most)
    pairs = zip(found.keys.astype(int).tolist(), (1 - found.distances).tolist(), strict=True)
    similar = dict(sorted(pairs, key=lambda pair: (-pair[1], pair[0])))
    paths, number = dict[int, str](), 0
    for some, _ in table._rows():
        paths |= {row: some[row - number] for row in similar if number <= row < number + len(some)}
        number += len(some)
    return [Hit(path=paths[row], similarity=similarity) for row, similarity in similar.items()]


def _index(table: SearchTable) -> "Index":
    """The index of a table: that beside it, or a new one. The name of its file has the table's digest and its own.

    Raises:
        SearchError: the file beside the table is damaged, or usearch is not installed.
    """
    try:
        from usearch.index import Index
    except ImportError as error:
        raise SearchError(
            f"{str(table.path)!r} has {len(table):,} rows, for which usearch is needed: pip install "
            "'omni-thinker[search]'."
        ) from error
    made_of = hashlib.sha256(json.dumps(table.document, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{table.path.name}.{made_of}"
    for path in table.path.parent.glob(f"{escape(name)}.*.usearch"):
        kept = Index.restore(str(path), view=True) if _digest(path) == path.suffixes[-2][1:] else None
        if kept is None:
            raise SearchError(
                f"{str(path)!r} is damaged: its name has another checksum; remove it, and it is made again."
            )
        return kept
    index, number = None, 0
    for paths, vectors in table.parts():
        if index is None:
            index = Index(ndim=vectors.shape[1], metric="cos", dtype="f32")
        index.add(np.arange(number, number + len(paths), dtype=np.uint64), vectors)
        number += len(paths)
    if index is None:
        raise TableError(f"{str(table.path)!r} has no vector; embed files that can be read.")
    aside = table.path.with_name(f".{name}.writing")
    index.save(str(aside))
    aside.replace(table.path.with_name(f"{name}.{_digest(aside)}.usearch"))
    return index


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
