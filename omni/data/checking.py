"""Find all problems of a data set before hours are spent on it: `omni check-data`.

    report = check({"train": Manifest.read("birds/train"), "test": Manifest.read("birds/test")})
    for problem in report.problems:
        print(problem.kind, problem.source, problem.sentence)

Every row is parsed and every picture file is decoded once, on several threads. Only a digest of the pixels is kept, so that
memory does not grow with the pictures. Two pictures are the same if their decoded pixels are equal, however they are
stored.
"""

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from omni.data.conversations import Example
from omni.data.manifests import Manifest, Row
from omni.data.sources import ManifestError, RowProblem
from omni.registry import ItemError, ItemProblem, get_modality, open_item

if TYPE_CHECKING:
    from omni.fusion.processing_omni import OmniProcessor

SetProblem = Literal["too long", "control token", "duplicate row", "duplicate picture", "leak", "text alone", "unused"]
Kind = RowProblem | ItemProblem | SetProblem
KINDS: tuple[Kind, ...] = (*get_args(RowProblem), *get_args(ItemProblem), *get_args(SetProblem))
NOTES = frozenset({"text alone", "unused"})
"""Problems that are reported but may be intended: chats without a picture, and files that no row names."""

_UNREAD = (".heic", ".heif", ".avif", ".svg")
"""Suffixes of picture files that omni does not read."""


class Problem(BaseModel):
    """One problem of a data set.

    Attributes:
        kind: one of `KINDS`.
        source: the row, by file and line or entry. For "unused", and where most rows are "text alone", the data set.
        file: the picture file, if the problem is about one.
        sentence: what is wrong and what to do, without the source.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    source: str
    file: str | None
    sentence: str


class Report(BaseModel):
    """The problems of some data sets. A file is reported once, with the first row that names it.

    Attributes:
        rows, pictures: number of rows and of picture files.
        problems: the problems, in the order of the rows.
    """

    model_config = ConfigDict(frozen=True)

    rows: int
    pictures: int
    problems: list[Problem]

    @property
    def clean(self) -> bool:
        """Whether there are no problems but notes."""
        return all(problem.kind in NOTES for problem in self.problems)


class _Seen(NamedTuple):
    pixels: bytes  # digest of the pixels
    tokens: int  # number of tokens that the picture becomes


@dataclass
class _Set:
    """The digests of one manifest, with the number of the row where each came first."""

    name: str
    manifest: Manifest
    rows: dict[bytes, int] = field(default_factory=dict)
    pictures: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)  # by pixels: the row and the file's key
    copies: set[bytes] = field(default_factory=set)  # keys of files that were reported as duplicates
    texts: list[int] = field(default_factory=list)  # rows that show no picture


def check(
    manifests: Mapping[str, Manifest],
    processor: "OmniProcessor | None" = None,
    max_length: int | None = None,
    max_positions: int | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Read all rows and pictures of some data sets, and report their problems.

    Args:
        manifests: data sets by name. A picture in two data sets is a "leak". Two files of the same picture in one data set
            are a "duplicate picture". One file with several questions is no problem.
        processor: a model's processor. With it, rows that are "too long" or hold a "control token" are found, too.
        max_length, max_positions: limits in tokens, see `ConversationCollator`. By default its own.
        workers: number of threads. By default one for each core.
        progress: called with the number of rows done.

    Raises:
        ValueError: `max_length` without a processor.
    """
    if processor is None and max_length is not None:
        raise ValueError(f"max_length={max_length} needs a processor, which counts the tokens of a row; pass one.")
    return _Check(processor, max_length, max_positions).run(manifests, workers or os.cpu_count() or 1, progress)


def render(report: Report) -> Table:
    """The number of problems of each kind, as a table for the terminal."""
    table = Table(title=f"{report.rows:,} rows, {report.pictures:,} pictures", min_width=40)
    table.add_column("problem")
    table.add_column("found", justify="right")
    counts = Counter(problem.kind for problem in report.problems)
    for kind in KINDS:
        if counts[kind]:
            table.add_row(f"{kind} (a note)" if kind in NOTES else kind, f"{counts[kind]:,}")
    return table


def first_of_each(report: Report, most: int = 3) -> list[str]:
    """Lines about the first problems of each kind, and the number of further ones."""
    lines = []
    for kind in KINDS:
        found = [problem for problem in report.problems if problem.kind == kind]
        lines += [f"{kind}: {problem.source}: {problem.sentence}" for problem in found[:most]]
        lines += [f"{kind}: and {len(found) - most:,} more; --json lists them"] if len(found) > most else []
    return lines


class _Check:
    def __init__(
        self, processor: "OmniProcessor | None", max_length: int | None, max_positions: int | None = None
    ) -> None:
        self.processor, self.collator = processor, None
        if processor is not None:
            from omni.data.collate import (
                MAX_LENGTH,
                ConversationCollator,
            )  # imports torch, which checking files alone does not need

            self.collator = ConversationCollator(processor, max_length or MAX_LENGTH, max_positions)
        self.problems: list[Problem] = []
        self.files: dict[
            bytes, Future[_Seen | ItemError] | _Seen | None
        ] = {}  # None: the file cannot be read, and this is reported
        self.contents: dict[bytes, _Seen] = {}

    def run(self, manifests: Mapping[str, Manifest], workers: int, progress: Callable[[int], None]) -> Report:
        sets = [_Set(name, manifest) for name, manifest in manifests.items()]
        done = 0
        with ThreadPoolExecutor(workers) as pool:
            for place, part in enumerate(sets):
                for index, row, keys in self._read_ahead(pool, part.manifest, 4 * workers):
                    if isinstance(row, ManifestError):
                        source = part.manifest.source(index)
                        self._report(row.kind, source, None, str(row).removeprefix(f"{source}: "))
                    else:
                        self._finish(part, sets[:place], index, row, keys)
                    done += 1
                    progress(done)
        for part in sets:
            self._note_texts(part)
            self._find_unused(part.manifest)
        return Report(rows=done, pictures=len(self.files), problems=self.problems)

    def _report(self, kind: Kind, source: str, file: Path | None, sentence: str) -> None:
        # file names need not be valid Unicode, but only valid Unicode can be printed or written as JSON
        source, sentence, name = (
            text.encode(errors="backslashreplace").decode() for text in (source, sentence, str(file or ""))
        )
        self.problems.append(Problem(kind=kind, source=source, file=name or None, sentence=sentence))

    def _read_ahead(
        self, pool: ThreadPoolExecutor, manifest: Manifest, window: int
    ) -> Iterator[tuple[int, Row | ManifestError, list[bytes]]]:
        """Yield rows in order, with the keys of their pictures. Threads already read the pictures of the next rows."""
        waiting: deque[tuple[int, Row | ManifestError, list[bytes]]] = deque()
        for index in range(len(manifest)):
            try:
                row = manifest[index]
            except ManifestError as error:
                waiting.append((index, error, []))
            else:
                keys = [_key(path, manifest) for path in row.pictures]
                for path, key in zip(row.pictures, keys, strict=True):
                    if key not in self.files:
                        self.files[key] = pool.submit(self._look, path)
                waiting.append((index, row, keys))
            if len(waiting) > window:
                yield waiting.popleft()
        yield from waiting

    def _look(self, path: Path) -> _Seen | ItemError:
        """Read one file, in a thread."""
        content = _digest_of_file(path)
        if content is not None and content in self.contents:
            return self.contents[content]
        try:
            picture = open_item("image")(path)
        except ItemError as error:
            return error
        tokens = 0
        if self.processor is not None:
            prepared = self.processor._prepare("image", [picture], {"return_tensors": "pt"})
            tokens = self.processor._counts("image", prepared)[0]
        seen = _Seen(_digest(repr(picture.size).encode(), picture.tobytes()), tokens)
        if content is not None:
            self.contents[content] = seen
        return seen

    def _finish(self, part: _Set, earlier: list[_Set], index: int, row: Row, keys: list[bytes]) -> None:
        if not keys:
            part.texts.append(index)
        seen = [self._result(row, path, key) for path, key in zip(row.pictures, keys, strict=True)]
        pixels = [one.pixels if one else key for one, key in zip(seen, keys, strict=True)]
        first = part.rows.setdefault(_digest(json.dumps(row.conversation).encode(), *pixels), index)
        if first != index:
            sentence = f"it repeats {part.manifest.source(first)}, with the same pictures; remove one of them."
            self._report("duplicate row", row.source, None, sentence)
            return
        for path, key, one in zip(row.pictures, keys, seen, strict=True):
            if one is not None:
                self._compare(part, earlier, index, row, path, key, one.pixels)
        if self.collator is not None and all(seen):
            example = Example({}, [row.conversation], row.source)
            if found := self.collator.problem(example, {"image": [one.tokens for one in seen if one]}):
                self._report(found.kind, row.source, None, f"it {str(found).removeprefix(f'{row.source} ')}")

    def _result(self, row: Row, path: Path, key: bytes) -> _Seen | None:
        """The contents of a file, or None if it cannot be read, which is reported the first time."""
        found = self.files[key]
        if isinstance(found, Future):
            result = found.result()
            found = None if isinstance(result, ItemError) else result
            self.files[key] = found
            if isinstance(result, ItemError):
                self._report(result.kind, row.source, path, str(result))
        return found

    def _compare(
        self, part: _Set, earlier: list[_Set], index: int, row: Row, path: Path, key: bytes, pixels: bytes
    ) -> None:
        """Report another file of this data set, or any file of an earlier one, that has the same pixels."""
        if pixels in part.pictures:
            first, other = part.pictures[pixels]
            if other != key and key not in part.copies:
                part.copies.add(key)
                where = _where(part.manifest, first, other)
                self._report(
                    "duplicate picture",
                    row.source,
                    path,
                    f"{str(path)!r} shows the same as {where}; keep one of the two files.",
                )
            return
        part.pictures[pixels] = index, key
        for other_part in earlier:
            if pixels in other_part.pictures:
                where = _where(other_part.manifest, *other_part.pictures[pixels])
                self._report(
                    "leak",
                    row.source,
                    path,
                    f"{str(path)!r} of {part.name} shows the same as {where} of {other_part.name}; "
                    "take it out of one of the two.",
                )
                return

    def _note_texts(self, part: _Set) -> None:
        """Report rows without a picture: each of them, or as one note if most rows have none."""
        number, rows = len(part.texts), len(part.manifest)
        remedy = "if it should, name the picture as `image` and put <image> into the text"
        if 2 * number > rows:
            self._report(
                "text alone", str(part.manifest.path), None, f"{number:,} of {rows:,} rows show no picture; {remedy}."
            )
            return
        for index in part.texts:
            self._report("text alone", part.manifest.source(index), None, f"it shows no picture; {remedy}.")

    def _find_unused(self, manifest: Manifest) -> None:
        suffixes = {*get_modality("image").suffixes, *_UNREAD}
        for folder, inside, files in os.walk(manifest.folder) if manifest.folder else ():
            inside.sort()
            for path in sorted(Path(folder, name) for name in files):
                if path.suffix.lower() in suffixes and _key(path, manifest) not in self.files:
                    self._report("unused", str(manifest.path), path, f"{str(path)!r} is named by no row.")
            if manifest.by_class and not (inside or files):
                self._report("unused", str(manifest.path), Path(folder), f"the class {folder!r} has no pictures.")


def _where(manifest: Manifest, index: int, key: bytes) -> str:
    """A file and the row that names it. The row is parsed again, because only digests are kept."""
    row = manifest[index]
    path = next(path for path in row.pictures if _key(path, manifest) == key)
    return f"{str(path)!r} ({row.source})"


def _digest(*parts: bytes) -> bytes:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.digest()


def _digest_of_file(path: Path) -> bytes | None:
    """The digest of a file's bytes; None if it is no regular file or cannot be read."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except (OSError, ValueError):
        pass
    return None


def _key(path: Path, manifest: Manifest) -> bytes:
    """A key that is equal for all names of one file. In folders of classes each name has a key, as each has a label."""
    try:
        name = os.path.abspath(path) if manifest.by_class else os.path.realpath(path)
    except ValueError:  # a null byte in it
        name = str(path)
    return _digest(name.encode(errors="surrogatepass"))
