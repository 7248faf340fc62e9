"""Questions of a user's own manifest: every answer in it is asked for, with the true turns before it as context."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from omni.data.manifests import PROMPT, Manifest, Row
from omni.data.sources import ManifestError
from omni.registry import ItemError, open_item

from .asking import Item, Pictures, Query

DEFAULT_KIND = "answer"


class ManifestQuestions:
    """The rows of a manifest, one question for every turn of the assistant.

    The model's answer must equal the manifest's, both without spaces around, in every other character.

    Args:
        path: a file or folder; see `omni.data.manifests`.
        root: where relative paths of pictures start; by default the manifest's folder.
        prompt: the question of rows that have only an answer.

    Raises:
        ManifestError, ItemError: a manifest, a row or a picture that cannot be read; the two latter on access.
    """

    parts = None

    def __init__(self, path: str | Path, root: str | Path | None = None, prompt: str = PROMPT) -> None:
        self.manifest = Manifest.read(path, root=root, prompt=prompt)

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Item:
        row = self.manifest[index]
        turns = [place for place, message in enumerate(row.conversation) if message["role"] == "assistant"]
        queries = [
            Query(row.kind or DEFAULT_KIND, row.conversation[:turn], _words(row.conversation[turn])) for turn in turns
        ]
        return Item(source=row.source, pictures=self._open(row), queries=tuple(queries))

    def swapped(self, index: int) -> Pictures:
        """The pictures of the next row with as many and not the same ones, the first row being next to the last."""
        partner = self._partners[index]
        assert partner is not None  # whoever asks has looked at `why_not_swapped`
        return self._open(self.manifest[partner])

    def why_not_swapped(self) -> str | None:
        """The first row without a partner."""
        alone = next((index for index, partner in enumerate(self._partners) if partner is None), None)
        if alone is None:
            return None
        row = self.manifest[alone]
        return f"{row.source} shows {len(row.pictures)} pictures, and no other row shows as many that are others"

    def data_hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """Over what all rows say and the bytes of their pictures; all are read, so that a bad one is told at once."""
        for index in range(len(self)):
            self._open(self.manifest[index])
            progress(index + 1)
        return self.manifest.digest()

    @cached_property
    def _partners(self) -> Sequence[int | None]:
        """For each row the one whose pictures it is shown instead; a row without pictures keeps what it has."""
        shown = [[_content(path) for path in row.pictures] for row in self.manifest]
        partners: list[int | None] = []
        for index, own in enumerate(shown):
            others = chain(range(index + 1, len(shown)), range(index)) if own else [index]
            fits = (other for other in others if len(shown[other]) == len(own))
            # picture by picture another one: else a question about the last of two might still see it
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


@lru_cache(maxsize=1024)  # rows that share a picture stand together
def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ManifestError(f"{str(path)!r} cannot be read ({error.strerror}); check the path.") from error
