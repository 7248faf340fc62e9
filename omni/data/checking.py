"""Find all problems of a data set before hours are spent on it: `omni check-data`.

    report = check({"train": Manifest.read("birds/train"), "test": Manifest.read("birds/test")})
    for problem in report.problems:
        print(problem.kind, problem.source, problem.sentence)

Every row, or a sample of them, is parsed and every file is decoded once, on several threads. Only a digest of what it holds
is kept, so that memory does not grow with the files. Two pictures are the same if their decoded pixels are equal, however
they are stored; so are two sounds of the same samples, and items of any modality that says what makes them the same
(`Modality.content`).
"""

import hashlib
import json
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from omni.data.conversations import Example, Message
from omni.data.manifests import File, Manifest, Row
from omni.data.problems import NOTES, Problem, Report, duplicate_of
from omni.data.rows import is_blank
from omni.data.sources import ManifestError
from omni.modality import ItemError
from omni.registry import get_modality, open_item

if TYPE_CHECKING:
    from omni.fusion.processing_omni import OmniProcessor

_UNREAD = (".heic", ".heif", ".avif", ".svg", ".m4a", ".aac", ".wma", ".aiff")
"""Suffixes of pictures and sounds that omni does not read."""


class _Seen(NamedTuple):
    content: bytes  # digest of its content
    tokens: int  # number of tokens that the item becomes


_Key = tuple[str, bytes]
"""A modality, and a digest of the name of a file."""


@dataclass
class _Set:
    """The digests of one manifest, with the number of the row where each came first."""

    name: str
    manifest: Manifest
    rows: dict[bytes, int] = field(default_factory=dict)
    items: dict[bytes, tuple[int, _Key]] = field(default_factory=dict)  # by content: the row and the file's key
    copies: set[_Key] = field(default_factory=set)  # keys of files that were reported as duplicates
    noted: dict[str, list[int]] = field(default_factory=dict)  # rows by the kind of their note


def check(
    manifests: Mapping[str, Manifest],
    processor: "OmniProcessor | None" = None,
    max_length: int | None = None,
    max_positions: int | None = None,
    *,
    sample: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Read all rows and files of some data sets, and report their problems.

    Args:
        manifests: data sets by name. A picture in two data sets is a "leak". Two files of the same picture in one data set
            are a "duplicate picture". One file with several questions is no problem.
        processor: a model's processor. With it, rows that are "too long", hold a "control token" or items that the model
            does not take are found, too.
        max_length, max_positions: limits in tokens, see `ConversationCollator`. By default its own.
        sample: number of rows to read of each data set, at random; by default all. A sample leaves out checks that need
            all rows, such as for files that no row names.
        workers: number of threads. By default one for each core.
        progress: called with the number of rows done.

    Raises:
        ValueError: `max_length` without a processor.
    """
    if processor is None and max_length is not None:
        raise ValueError(f"max_length={max_length} needs a processor, which counts the tokens of a row; pass one.")
    found = _Check(processor, max_length, max_positions, sample)
    return found.run(manifests, workers or os.cpu_count() or 1, progress)


def chosen(rows: int, sample: int | None) -> Sequence[int]:
    """The rows that are read: all, or a fixed random sample, in their order."""
    return range(rows) if sample is None or sample >= rows else sorted(random.Random(0).sample(range(rows), sample))


class _Check:
    def __init__(
        self,
        processor: "OmniProcessor | None",
        max_length: int | None,
        max_positions: int | None = None,
        sample: int | None = None,
    ) -> None:
        self.processor, self.collator, self.sample, self.part = processor, None, sample, ""
        if processor is not None:
            # imported here, because it imports torch, which checking files alone does not need
            from omni.data.collate import MAX_LENGTH, ConversationCollator

            self.collator = ConversationCollator(processor, max_length or MAX_LENGTH, max_positions)
        self.problems: list[Problem] = []
        # None: the file cannot be read, and this is reported
        self.files: dict[_Key, Future[_Seen | ItemError] | _Seen | None] = {}
        self.contents: dict[_Key, _Seen] = {}

    def run(self, manifests: Mapping[str, Manifest], workers: int, progress: Callable[[int], None]) -> Report:
        sets = [_Set(name, manifest) for name, manifest in manifests.items()]
        read = {name: len(chosen(len(manifest), self.sample)) for name, manifest in manifests.items()}
        done = 0
        with ThreadPoolExecutor(workers) as pool:
            for place, part in enumerate(sets):
                self.part = part.name
                for index, row, keys in self._read_ahead(pool, part.manifest, 4 * workers):
                    if isinstance(row, ManifestError):
                        source = part.manifest.source(index)
                        self._report(row.kind, source, None, str(row).removeprefix(f"{source}: "))
                    else:
                        self._finish(part, sets[:place], index, row, keys)
                    done += 1
                    progress(done)
        for part in sets:
            self.part = part.name
            for kind in filter(part.noted.get, NOTES):
                self._note(part.manifest, kind, part.noted[kind], read[part.name])
            if read[part.name] == len(part.manifest):
                self._find_unused(part.manifest)
        counts = Counter(modality for modality, _ in self.files)
        whole = all(read[name] == len(manifest) for name, manifest in manifests.items())
        items = dict(sorted(counts.items()))
        return Report(rows=done, parts=read, whole=whole, items=items, problems=self.problems)

    def _report(self, kind: str, source: str, file: File | Path | None, sentence: str) -> None:
        named = (
            str(file.address or (file.path if file.path.name else "")) if isinstance(file, File) else str(file or "")
        )
        # file names need not be valid Unicode, but only valid Unicode can be printed or written as JSON
        source, sentence, name = (text.encode(errors="backslashreplace").decode() for text in (source, sentence, named))
        self.problems.append(Problem(kind=kind, part=self.part, source=source, file=name or None, sentence=sentence))

    def _read_ahead(
        self, pool: ThreadPoolExecutor, manifest: Manifest, window: int
    ) -> Iterator[tuple[int, Row | ManifestError, list[_Key]]]:
        """Yield rows in order, with the keys of their files. Threads already read the files of the next rows."""
        waiting: deque[tuple[int, Row | ManifestError, list[_Key]]] = deque()
        for index in chosen(len(manifest), self.sample):
            try:
                row = manifest[index]
            except ManifestError as error:
                waiting.append((index, error, []))
            else:
                keys = [(file.modality, _key(file, manifest)) for file in row.files]
                for file, key in zip(row.files, keys, strict=True):
                    if key not in self.files:
                        self.files[key] = pool.submit(self._look, file)
                waiting.append((index, row, keys))
            if len(waiting) > window:
                yield waiting.popleft()
        yield from waiting

    def _look(self, file: File) -> _Seen | ItemError:
        """Read one file, in a thread."""
        try:
            source = file.source
            stored = _digest_of_file(source)
            if stored is not None and (file.modality, stored) in self.contents:
                return self.contents[file.modality, stored]
            item = open_item(file.modality)(source)
        except ItemError as error:
            return error
        tokens = 0
        if self.processor is not None and file.modality in self.processor.preprocessors:
            try:
                prepared = self.processor.prepare(file.modality, [item], {"return_tensors": "pt"})
                (tokens,) = self.processor.count_tokens(file.modality, prepared)
            except ValueError as error:  # the sound may be longer than the encoder takes
                kind = type(error) if isinstance(error, ItemError) else ItemError
                return kind(f"{file} cannot be prepared: {error}")
        content = get_modality(file.modality).content
        held = content(item) if content else stored or b""
        seen = _Seen(_digest(file.modality.encode(), held), tokens)
        if stored is not None:
            self.contents[file.modality, stored] = seen
        return seen

    def _finish(self, part: _Set, earlier: list[_Set], index: int, row: Row, keys: list[_Key]) -> None:
        if not keys:
            part.noted.setdefault("text alone", []).append(index)
        if any(not _has_words(message) for message in row.conversation):
            part.noted.setdefault("no words", []).append(index)
        seen = [self._result(row, file, key) for file, key in zip(row.files, keys, strict=True)]
        held = [one.content if one else key for one, (_, key) in zip(seen, keys, strict=True)]
        first = part.rows.setdefault(_digest(json.dumps(row.conversation).encode(), *held), index)
        if first != index:
            sentence = f"it repeats {part.manifest.source(first)}, with the same items; remove one of them."
            self._report("duplicate row", row.source, None, sentence)
            return
        for file, key, one in zip(row.files, keys, seen, strict=True):
            if one is not None:
                self._compare(part, earlier, index, row, file, key, one.content)
        if self.collator is not None and all(seen):
            tokens: dict[str, list[int]] = {}
            for file, one in zip(row.files, seen, strict=True):
                tokens.setdefault(file.modality, []).append(one.tokens if one else 0)
            if found := self.collator.problem(Example({}, [row.conversation], row.source), tokens):
                self._report(found.kind, row.source, None, f"it {str(found).removeprefix(f'{row.source} ')}")

    def _result(self, row: Row, file: File, key: _Key) -> _Seen | None:
        """The contents of a file, or None if it cannot be read, which is reported the first time."""
        found = self.files[key]
        if isinstance(found, Future):
            result = found.result()
            found = None if isinstance(result, ItemError) else result
            self.files[key] = found
            if isinstance(result, ItemError):
                self._report(result.kind, row.source, file, str(result))
        return found

    def _compare(
        self, part: _Set, earlier: list[_Set], index: int, row: Row, file: File, key: _Key, content: bytes
    ) -> None:
        """Report another file of this data set, or any file of an earlier one, that holds the same."""
        noun = get_modality(file.modality).noun
        if content in part.items:
            first, other = part.items[content]
            if other != key and key not in part.copies:
                part.copies.add(key)
                where = _where(part.manifest, first, other)
                self._report(
                    duplicate_of(file.modality),
                    row.source,
                    file,
                    f"{file} is the same {noun} as {where}; keep one of the two files.",
                )
            return
        part.items[content] = index, key
        for other_part in earlier:
            if content in other_part.items:
                where = _where(other_part.manifest, *other_part.items[content])
                self._report(
                    "leak",
                    row.source,
                    file,
                    f"{file} of {part.name} is the same {noun} as {where} of {other_part.name}; "
                    "take it out of one of the two.",
                )
                return

    def _note(self, manifest: Manifest, kind: str, rows: list[int], total: int) -> None:
        """Report rows with the same note: each of them, or as one if most rows have it."""
        what, remedy = {
            "text alone": (
                "no items",
                f"if there should be one, {manifest.names.remedy} and put a placeholder into the text",
            ),
            "no words": ("a question without words", "if its items are not the question, write one"),
        }[kind]
        number = len(rows)
        if 2 * number > total:
            self._report(kind, str(manifest.path), None, f"{number:,} of {total:,} rows have {what}; {remedy}.")
            return
        for index in rows:
            self._report(kind, manifest.source(index), None, f"it has {what}; {remedy}.")

    def _find_unused(self, manifest: Manifest) -> None:
        suffixes, named = {*manifest.names.suffixes, *_UNREAD}, {key for _, key in self.files}
        for folder, inside, files in os.walk(manifest.folder) if manifest.folder else ():
            inside.sort()
            for path in sorted(Path(folder, name) for name in files):
                if path.suffix.lower() in suffixes and _key(File("", path), manifest) not in named:
                    self._report("unused", str(manifest.path), path, f"{str(path)!r} is named by no row.")
            if manifest.by_class and not (inside or files):
                self._report("unused", str(manifest.path), Path(folder), f"the class {folder!r} has no files.")


def _has_words(message: Message) -> bool:
    return any(block["type"] == "text" and not is_blank(block["text"]) for block in message["content"])


def _where(manifest: Manifest, index: int, key: _Key) -> str:
    """A file and the row that names it. The row is parsed again, because only digests are kept."""
    row = manifest[index]
    file = next(file for file in row.files if (file.modality, _key(file, manifest)) == key)
    return f"{file} ({row.source})"


def _digest(*parts: bytes) -> bytes:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.digest()


def _digest_of_file(source: Path | bytes) -> bytes | None:
    """The digest of a file's bytes; None if it is no regular file or cannot be read."""
    if isinstance(source, bytes):
        return _digest(source)
    path = source
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except (OSError, ValueError):
        pass
    return None


def _key(file: File, manifest: Manifest) -> bytes:
    """A key that is equal for all names of one file. In folders of classes each name has a key, as each has a label."""
    if file.data is not None:
        return _digest(b"held", file.data)
    path = file.path
    try:
        name = os.path.abspath(path) if manifest.by_class else os.path.realpath(path)
    except ValueError:  # a null byte in it
        name = str(path)
    return _digest(name.encode(errors="surrogatepass"))
