"""The weights of a checkpoint on disk: what is in its files, and hashes by which a damaged or exchanged part is found.

A saved configuration carries a fingerprint of each part's weights, and a checksum of each file. A file that is byte by byte
as it was written has the weights that it was saved with; of any other one they are hashed again, part by part.
"""

import hashlib
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from math import prod
from mmap import ACCESS_COPY, ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

# --- Files ------------------------------------------------------------------------------------------------------------

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What its files call them; others are read by its library alone."""


class MappedTensor(NamedTuple):
    """A tensor in a file that is mapped into memory, which is read when it is used."""

    dtype: torch.dtype | None  # none of SAFETENSORS_TYPES
    shape: tuple[int, ...]
    values: memoryview

    def tensor(self) -> torch.Tensor:
        """In the memory of the map; what is written into it goes into a copy, never into the file."""
        assert self.dtype is not None
        if not self.values:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(self.values, dtype=self.dtype).view(self.shape)


def map_tensors(file: Path) -> dict[str, MappedTensor]:
    """The tensors of a safetensors file by name, as its library finds them, sooner; its header is checked.

    Raises:
        ValueError: no safetensors file, or not a whole one.
        OSError: one that cannot be read.
    """
    found, places = {}, []
    try:
        with open(file, "rb") as opened:
            data = memoryview(mmap(opened.fileno(), 0, access=ACCESS_COPY))
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                dtype, shape = SAFETENSORS_TYPES.get(entry["dtype"]), tuple(entry["shape"])
                first, end = entry["data_offsets"]
                if any(type(size) is not int or size < 0 for size in shape):
                    raise ValueError(f"{name} is said to have the shape {shape}")
                if dtype is not None and end - first != prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} is said to have {end - first} bytes")
                found[name] = MappedTensor(dtype, shape, data[start + first : start + end])
                places.append((first, end))
        places.sort()
        if [0, *(end for _, end in places)] != [*(first for first, _ in places), len(data) - start]:
            raise ValueError("its tensors do not stand side by side")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is not a whole safetensors file ({error}); get it again.") from error
    return found


def read_tensors(folder: str | Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder as they stand in its safetensors file or shards (memory-mapped)."""
    tensors: dict[str, torch.Tensor] = {}
    for file in safetensors_files(Path(folder), variant):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def safetensors_files(folder: Path, variant: str | None) -> list[Path]:
    """One file, or those of an index; `save_pretrained(variant="ema")` has its name in all of them."""
    middle = f".{variant}" if variant else ""
    whole = folder / f"model{middle}.safetensors"
    if whole.exists():
        return [whole]
    index = json.loads((folder / f"model.safetensors.index{middle}.json").read_text(encoding="utf-8"))
    return sorted({folder / file for file in index["weight_map"].values()})


# --- Fingerprints -----------------------------------------------------------------------------------------------------


def part_of(name: str) -> str:
    """The part of a fused model that a tensor belongs to (`image_tower`, `language_model`, ...); else `encoder`."""
    first = name.removeprefix("model.").split(".", 1)[0]
    return first if first.endswith(("_tower", "_projector")) or first in ("language_model", "lm_head") else "encoder"


def fingerprint_parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A hash of names, types, shapes and values of each part's tensors; equal exactly when the tensors are.

    A tower's fingerprint equals that of the same encoder saved alone.
    """
    digests = _Digests()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digests.add(name, tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digests.finish()


def fingerprint_folder(folder: Path, variant: str | None = None) -> dict[str, str]:
    """`fingerprint_parts` of a checkpoint's tensors, read straight from its files, which leaves other threads alone."""
    found = {name: entry for file in safetensors_files(folder, variant) for name, entry in map_tensors(file).items()}
    digests = _Digests()
    for name in sorted(found):
        dtype, shape, values = found[name]
        if dtype is None:
            return fingerprint_parts(read_tensors(folder, variant))
        digests.add(name, dtype, shape, values)
    return digests.finish()


class _Digests:
    """Hashes of parts. Values are gathered, since around each hash the interpreter changes hands between threads."""

    AT_ONCE = 32 * 2**20

    def __init__(self) -> None:
        self.digests: dict[str, Any] = {}
        self.part, self.waiting, self.size = "", list[bytes | memoryview](), 0

    def add(self, name: str, dtype: torch.dtype, shape: Sequence[int], values: memoryview) -> None:
        """A tensor; those of a part come in the order of their names."""
        if (part := part_of(name)) != self.part:
            self._update()
            self.part = part
        inner = name.removeprefix("model.").removeprefix(f"{part}.")
        self.waiting.append(f"{inner} {dtype} {tuple(shape)}\n".encode())
        for start in range(0, len(values), self.AT_ONCE):
            self.waiting.append(values[start : start + self.AT_ONCE])
            self.size += len(self.waiting[-1])
            if self.size >= self.AT_ONCE:
                self._update()

    def _update(self) -> None:
        if self.waiting:
            self.digests.setdefault(self.part, hashlib.sha256()).update(b"".join(self.waiting))
        self.waiting, self.size = [], 0

    def finish(self) -> dict[str, str]:
        """Hexadecimal, by part."""
        self._update()
        return {part: digest.hexdigest()[:32] for part, digest in sorted(self.digests.items())}


def verify_fingerprints(folder: Any, subfolder: str = "", untrained: Collection[str] = ()) -> None:
    """Compare the weights in a local folder with the fingerprints in its configuration, where it has them.

    Args:
        folder: of a checkpoint, or None.
        subfolder: inside of it.
        untrained: parts that are known not to be those that were saved.

    Raises:
        ValueError: a part whose weights are not those that were saved together with the others.
    """
    compare_fingerprints(folder, *saved_and_found(folder, subfolder), untrained)


def saved_and_found(folder: Any, subfolder: str, variant: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """The fingerprints in a local folder's configuration and those of its weights; none where it has none."""
    if folder is None or not (Path(folder) / subfolder / "config.json").is_file():
        return {}, {}
    folder = Path(folder) / subfolder
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = values.get("fingerprints") or {}
    if saved and values.get("checksums") == checksums(folder, variant):
        return saved, saved  # the files are as they were written, byte by byte
    return saved, fingerprint_folder(folder, variant) if saved else {}


def compare_fingerprints(
    folder: Any, saved: Mapping[str, str], found: Mapping[str, str], untrained: Collection[str]
) -> None:
    """As `verify_fingerprints`, of those that `saved_and_found` has."""
    parts = {*saved, *found} - set(untrained)
    changed = sorted(part for part in parts if saved.get(part) != found.get(part))
    if changed:
        raise ValueError(
            f"In {str(folder)!r} the weights of {', '.join(changed)} are not those that were saved with this "
            "configuration: the file was damaged, or a part was exchanged for another. A projector and a language model "
            "work with the encoder that they were trained with; restore the file, or train the projector again and save "
            "the model with save_pretrained."
        )


# --- Checksums --------------------------------------------------------------------------------------------------------


def checksums(folder: Path, variant: str | None = None) -> dict[str, str]:
    """CRC-32 of each file with weights, by its name; a third of the work of fingerprints, and any damage changes it."""
    found = {}
    for file in safetensors_files(folder, variant):
        with open(file, "rb") as opened:
            data, value = memoryview(mmap(opened.fileno(), 0, access=ACCESS_READ)), 0
        for start in range(0, len(data), _Digests.AT_ONCE):
            value = zlib.crc32(data[start : start + _Digests.AT_ONCE], value)
        found[file.name] = f"{value:08x}"
    return found


def note_checksums(folder: Path, variant: str | None = None) -> dict[str, str]:
    """Write the checksums of a folder's weights into its config.json."""
    path, found = folder / "config.json", checksums(folder, variant)
    values = {**json.loads(path.read_text(encoding="utf-8")), "checksums": found}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return found
