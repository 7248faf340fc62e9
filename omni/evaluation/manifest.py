"""The questions of a manifest: one for each answer in it, with the turns before it as context."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from omni.data.manifests import File, Manifest
from omni.data.sources import ManifestError
from omni.registry import get_modality

from .asking import Example, Query

DEFAULT_KIND = "answer"


class ManifestQuestions:
    """The rows of a manifest as examples, with one question for each turn of the assistant.

    The model's answer is right if it equals the manifest's, character by character, without spaces around them.

    Args:
        path: a file or folder; see `omni.data.manifests`.
        root: the folder that relative paths of files start from. By default the manifest's folder.
        prompt: the question for rows that have only a caption.
        addresses, allow_private: a folder for what is downloaded, and from where; see `Manifest.read`.

    Raises:
        ManifestError, ItemError: the manifest cannot be read; or, on access, a row or a file cannot be read.
    """

    parts = None

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        prompt: str | None = None,
        addresses: str | Path | None = None,
        allow_private: bool = False,
    ) -> None:
        self.manifest = Manifest.read(path, root=root, prompt=prompt, addresses=addresses, allow_private=allow_private)
        self._found: dict[str, Sequence[int | None]] = {}

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> Example:
        row = self.manifest[index]
        turns = [place for place, message in enumerate(row.conversation) if message["role"] == "assistant"]
        queries = [
            Query(row.kind or DEFAULT_KIND, row.conversation[:turn], _words(row.conversation[turn])) for turn in turns
        ]
        return Example(source=row.source, items=row.open(), queries=tuple(queries))

    @cached_property
    def modalities(self) -> Sequence[str]:
        """The modalities of all rows, sorted. Raises `ManifestError` if a row cannot be read."""
        return sorted({file.modality for row in self.manifest for file in row.files})

    def swapped(self, index: int, modality: str) -> Sequence[Any]:
        """The items of the next row that has as many others. After the last row comes the first."""
        partner = self._partners(modality)[index]
        assert partner is not None  # `why_not_swapped` was asked first
        return self.manifest[partner].open()[modality]

    def why_not_swapped(self, modality: str) -> str | None:
        """A sentence about the first row without a partner; None if each has one."""
        alone = next((index for index, partner in enumerate(self._partners(modality)) if partner is None), None)
        if alone is None:
            return None
        row, noun = self.manifest[alone], get_modality(modality).noun
        return f"{row.source} has {len(row.of(modality))} {noun}s, and no other row has as many different ones"

    def data_hash(self, progress: Callable[[int], None] = lambda done: None) -> str:
        """sha256 of all rows and of the bytes of their files. All are opened, so that a bad one is found first."""
        for index in range(len(self)):
            self.manifest[index].open()
            progress(index + 1)
        return self.manifest.digest()

    def _partners(self, modality: str) -> Sequence[int | None]:
        """For each row, the row whose items take the place of its own. A row without any is its own partner."""
        if modality in self._found:
            return self._found[modality]
        held = [[_content(file) for file in row.files if file.modality == modality] for row in self.manifest]
        partners: list[int | None] = []
        for index, own in enumerate(held):
            others = chain(range(index + 1, len(held)), range(index)) if own else [index]
            fits = (other for other in others if len(held[other]) == len(own))
            # each item must differ from the one in its place, or a question about that one could still be answered
            differs = (other for other in fits if not any(map(str.__eq__, held[other], own)) or not own)
            partners.append(next(differs, None))
        self._found[modality] = partners
        return partners


def _words(message: dict[str, Any]) -> str:
    return "".join(block["text"] for block in message["content"]).strip()


def _content(file: File) -> str:
    try:
        return file.digest()
    except OSError as error:
        raise ManifestError(f"{file} cannot be read ({error.strerror}); check the path.") from error
