"""Encoder tokens of files, cached on disk by content, so that a file is decoded and encoded once.

    cache = TokenCache("cache", FrozenTower("image", section, tower, preprocessor))
    item = cache.encode("photo.jpg")  # an `EncodedItem`, from the cache or new

The name of an entry is a hash of the file, the preprocessing and the encoder's weights. If one of these changes, no old
entry matches. An entry is one file with a checksum at its end, written under another name and then renamed. So a reader
sees a whole entry or none, even if another process writes it or is killed at that moment.
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
"""Names of a cache's files. Other files in the folder are left alone."""


@dataclass(frozen=True)
class FrozenTower:
    """An encoder that is not trained, and the preprocessor of its items.

    Attributes:
        modality: name of the modality.
        section: its section in the fused model's configuration: the `encoder`, and the `output` to keep.
        tower: the encoder, in eval mode. It encodes in its own precision and on its own device.
        preprocessor: turns items into the encoder's inputs.
    """

    modality: str
    section: Mapping[str, Any]
    tower: PreTrainedModel
    preprocessor: Any

    @torch.inference_mode()
    def encode(self, item: Any) -> EncodedItem:
        """Encode one item. The tokens are NumPy arrays, float32: `cls` [1, D] and/or `grid` [N, D]."""
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
        """Everything that the tokens depend on, as JSON values."""
        weights = fingerprint_parts(self.tower.state_dict())
        settings = self.tower.config.to_dict(), self.preprocessor.to_dict()
        return [self.modality, self.section["output"], *settings, weights]


class TokenCache:
    """Encoded items in a folder. When the folder is too large, the least recently used entries are removed.

    Args:
        folder: created if it does not exist. Several processes and several encoders may share it.
        tower: encodes the items, one at a time.
        max_bytes: largest size of all entries together. Each `TokenCache` checks the size when it is created, and after it
            has written a tenth of `max_bytes`. So with n writers the folder may be larger by n tenths.

    Attributes:
        hits: number of items found in the cache.
        misses: number of items that had to be encoded.
    """

    def __init__(self, folder: str | Path, tower: FrozenTower, max_bytes: int = 20 * 10**9) -> None:
        self.folder, self.tower, self.max_bytes = Path(folder), tower, max_bytes
        self.hits = self.misses = self._written = 0
        self._made_by = json.dumps([FORMAT, *tower.identity], sort_keys=True, default=str).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room()

    def encode(self, path: str | Path | bytes) -> EncodedItem:
        """The encoded item of a file, given as a path or as bytes. The tokens are NumPy arrays, float32.

        Raises:
            ItemError: the file cannot be read. No entry is written.
        """
        content = path if isinstance(path, bytes) else _content(Path(path))
        entry = self._entry(content) if content is not None else None
        item = _read(entry) if entry else None
        if item is not None:
            self.hits += 1
            return item
        self.misses += 1
        try:  # the bytes that were hashed, because the file may have changed since
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
        """The path of the entry for the bytes of a file."""
        digest = hashlib.sha256(self._made_by)
        digest.update(content)
        return self.folder / digest.hexdigest()[:2] / digest.hexdigest()[2:]

    def _make_room(self) -> None:
        """Remove the least recently used entries until the rest fits. Other processes may do the same."""
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
    """The bytes of a file; None if it is no readable file, which `open_item` then refuses."""
    try:
        return path.read_bytes() if path.is_file() else None  # reading a pipe might never end
    except (OSError, ValueError):
        return None


def _read(entry: Path) -> EncodedItem | None:
    """An entry; None if it is missing or damaged. A damaged one is removed."""
    try:
        content = entry.read_bytes()
        body, checksum = content[:-4], content[-4:]
        if not body or zlib.crc32(body).to_bytes(4, "big") != checksum:  # four zeros are a valid checksum of no data
            entry.unlink(missing_ok=True)
            return None
        os.utime(entry)  # marks it as recently used
    except OSError:
        return None
    arrays = load(body)
    return EncodedItem(tokens=arrays, grid_shape=tuple(arrays.pop(SHAPE).tolist()))


def _write(entry: Path, item: EncodedItem) -> int:
    """Write an entry and return its size in bytes; 0 if it cannot be written, such as on a full disk."""
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
