"""What an encoder says of files, kept on disk by content: a file is decoded and encoded once.

    cache = TokenCache("cache", FrozenTower("image", section, tower, preprocessor))
    item = cache.encode("photo.jpg")  # an `EncodedItem`: from the disk, or made now and kept

An entry's name is a hash of the file, of the preprocessing and of the encoder's weights: where one of these changes, no old
entry is found. Entries are single files, written under another name first and with a checksum at their
end, so that a reader sees a whole entry or none, whoever else reads, writes or is killed at that moment.
"""

import hashlib
import json
import os
import re
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from transformers import PreTrainedModel

from omni.checkpoints.fingerprints import fingerprint_parts
from omni.fusion.encoded_item import EncodedItem
from omni.fusion.encoding import run_tower
from omni.modality import ItemError
from omni.registry import get_modality, open_item, prepare_items

FORMAT = "omni token cache 2"
SHAPE = "grid_shape"
UNFINISHED = "unfinished-"
_OURS = re.compile(rf"[0-9a-f]{{2}}/([0-9a-f]{{62}}|{UNFINISHED}\w+)")
"""The files of a cache; a folder that was given by mistake has others."""


@dataclass(frozen=True)
class FrozenTower:
    """An encoder that does not learn, with what prepares its items.

    Attributes:
        modality: its name.
        section: what the configuration of the fused model says of it: its `encoder`, and the `output` that is kept.
        tower: the encoder, in eval mode. It encodes in its own precision and on its own device.
        preprocessor: of its items.
    """

    modality: str
    section: Mapping[str, Any]
    tower: PreTrainedModel
    preprocessor: Any

    @torch.inference_mode()
    def encode(self, item: Any) -> EncodedItem:
        """What it says of one item; the tokens are NumPy arrays, float32."""
        inputs = prepare_items(get_modality(self.modality), self.preprocessor, [item], {"return_tensors": "pt"})
        inputs = {
            key: value.to(self.tower.device, self.tower.dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        _, (encoded,) = run_tower(self.modality, self.section, self.tower, inputs)
        tokens = {part: value.float().cpu().numpy() for part, value in encoded.tokens.items()}
        return EncodedItem(tokens, encoded.grid_shape)

    @property
    def identity(self) -> list[Any]:
        """All that its tokens depend on."""
        weights = fingerprint_parts(self.tower.state_dict())
        settings = self.tower.config.to_dict(), self.preprocessor.to_dict()
        return [self.modality, self.section["output"], *settings, weights]


class TokenCache:
    """Encoded items in a folder. Those that were not used for the longest time leave when there are too many.

    Args:
        folder: where they are; made if need be. Several processes and several encoders may share it.
        tower: what encodes, one item at a time.
        max_bytes: of all entries in the folder together. Each object counts when it is made, and again whenever it has
            written a tenth of that. So where n of them write, one in each process, there may be n tenths more.

    Attributes:
        hits, misses: items that were there, and items that had to be encoded.
    """

    def __init__(self, folder: str | Path, tower: FrozenTower, max_bytes: int = 20 * 10**9) -> None:
        self.folder, self.tower, self.max_bytes = Path(folder), tower, max_bytes
        self.hits = self.misses = self._written = 0
        self._made_by = json.dumps([FORMAT, *tower.identity], sort_keys=True, default=str).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room()

    def encode(self, path: str | Path | bytes) -> EncodedItem:
        """What the encoder says of a file, by its path or its bytes; its tokens are NumPy arrays, float32.

        Raises:
            ItemError: the file cannot be read; nothing is kept of it.
        """
        content = path if isinstance(path, bytes) else _content(Path(path))
        entry = self._entry(content) if content is not None else None
        item = _read(entry) if entry else None
        if item is not None:
            self.hits += 1
            return item
        self.misses += 1
        try:  # the same bytes that were hashed: the file may be another one by now
            opened = open_item(self.tower.modality)(path if content is None else content)
            item = self.tower.encode(opened)
        except ItemError as error:
            if content is None or content is path:
                raise
            raise type(error)(f"{str(path)!r}: {error}") from error
        if entry:
            self._written += _write(entry, item)
            if self._written > self.max_bytes // 10:
                self._make_room()
        return item

    def _entry(self, content: bytes) -> Path:
        """Where the tokens of a file belong."""
        digest = hashlib.sha256(self._made_by)
        digest.update(content)
        return self.folder / digest.hexdigest()[:2] / digest.hexdigest()[2:]

    def _make_room(self) -> None:
        """Remove entries until the rest fits, the least recently used ones first; other processes may do so too."""
        self._written = 0
        entries = []
        for entry in self.folder.glob("??/*"):
            if not _OURS.fullmatch(f"{entry.parent.name}/{entry.name}"):
                continue
            try:
                found = entry.stat()
            except OSError:
                continue  # another process removed it
            entries.append((found.st_mtime_ns, found.st_size, entry))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self.max_bytes:
                break
            entry.unlink(missing_ok=True)
            total -= size


def _content(path: Path) -> bytes | None:
    """The bytes of a file; None of what is no file that could be read, and will be refused."""
    try:
        return path.read_bytes() if path.is_file() else None  # a pipe might never end
    except (OSError, ValueError):
        return None


def _read(entry: Path) -> EncodedItem | None:
    """An entry, if it is there and whole; one that is damaged is removed."""
    try:
        content = entry.read_bytes()
        body, checksum = content[:-4], content[-4:]
        if not body or zlib.crc32(body).to_bytes(4, "big") != checksum:  # the checksum of nothing is right for zeros
            entry.unlink(missing_ok=True)
            return None
        os.utime(entry)  # used now
    except OSError:
        return None
    arrays = load(body)
    return EncodedItem(tokens=arrays, grid_shape=tuple(arrays.pop(SHAPE).tolist()))


def _write(entry: Path, item: EncodedItem) -> int:
    """Put an entry where it belongs and return how many bytes it has; on a full disk there is no entry, and no error."""
    body = save({**item.tokens, SHAPE: np.array(item.grid_shape)})
    try:
        entry.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=entry.parent, prefix=UNFINISHED, delete=False) as file:
            try:
                file.write(body + zlib.crc32(body).to_bytes(4, "big"))
                file.close()
                os.replace(file.name, entry)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        return 0
    return len(body) + 4
