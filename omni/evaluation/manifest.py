"""The questions of a manifest. Every answer in it is asked for; the turns before it are the context."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from omni.data.manifests import PROMPT, Manifest, Row
from omni.data.sources import ManifestError
from omni.registry import ItemError, open_item

from .asking import Example, Pictures, Query

DEFAULT_KIND = "answer"


class ManifestQuestions:
    """The rows of a manifest as examples, with one question for each turn of the assistant.

    The model's answer is right if it equals the manifest's, character by character, without spaces around them.

    Args:
        path: a file or folder; see `omni.data.manifests`.
        root: the folder that relative paths of pictures start from. By default the manifest's folder.
        prompt: the question for rows that have only an answer.

    Raises:
        ManifestError, ItemError: the manifest cannot be read; or, on access, a row or a picture cannot be read.
    """

    parts = None

    def __init__(self, path: str | Path, root: str | Path | None = None, prompt: str = PROMPT) -> None:
        self.manifest = Manifest.read(path, root=root, prompt=prompt)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Example:
        row = self.manifest[index]
        turns = [place for place, message in enumerate(row.conversation) if message["role"] == "assistant"]
        queries = [
            Query(row.kind or DEFAULT_KIND, row.conversation[:turn], _words(row.conversation[turn])) for turn in turns
        ]
        return Example(source=row.source, pictures=self._open(row), queries=tuple(queries))

    def swapped(self, index: int) -> Pictures:
        """The pictures of the next row that shows as many others. After the last row comes the first."""
        partner = self._partners[index]
        assert partner is not None  # `why_not_swapped` was asked first
        return self._open(self.manifest[partner])

    def why_not_swapped(self) -> str | None:
        """A sentence about the first row without a partner; None if each has one."""
        alone = next((index for index, partner in enumerate(self._partners) if partner is None), None)
        if alone is None:
            return None
        row = self.manifest[alone]
        return f"{row.source} shows {len(row.pictures)} pictures, and no other row shows as many different ones"

    def data_hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """sha256 of all rows and of the bytes of their pictures. All are opened, so that a bad one is found first."""
        for index in range(len(self)):
            self._open(self.manifest[index])
            progress(index + 1)
        return self.manifest.digest()

    @cached_property
    def _partners(self) -> Sequence[int | None]:
        """For each row, the row whose pictures take the place of its own. A row without pictures is its own partner."""
        shown = [[_content(path) for path in row.pictures] for row in self.manifest]
        partners: list[int | None] = []
        for index, own in enumerate(shown):
            others = chain(range(index + 1, len(shown)), range(index)) if own else [index]
            fits = (other for other in others if len(shown[other]) == len(own))
            # each picture must differ from the one in its place, or a question about that one could still be answered
            differs = (other for other in fits if not any(map(str.__eq__, shown[other], own)) or not own)
            partners.append(next(differs, None))
        return partners

    def _open(self, row: Row) -> Pictures:
        try:
            return tuple(open_item("image")(path) for path in row.pictures)
        except ItemError as error:
            raise type(error)(f"{row.source}: {error}") from error


def _words(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"]).strip()


@lru_cache(maxsize=1024)  # rows that share a picture are often neighbours
def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ManifestError(f"{str(path)!r} cannot be read ({error.strerror}); check the path.") from error
