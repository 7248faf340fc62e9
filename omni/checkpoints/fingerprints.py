"""The weights of a checkpoint on disk: what is in its files, and a hash by which a damaged or exchanged part is found.

A saved configuration carries a fingerprint of each part's weights, under `fingerprints`. Whoever loads the weights hashes
them again, part by part, and compares.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# --- Files ------------------------------------------------------------------------------------------------------------


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
    digests: dict[str, Any] = {}
    for name in sorted(tensors):
        tensor, part = tensors[name].detach().cpu().contiguous(), part_of(name)
        inner = name.removeprefix("model.").removeprefix(f"{part}.")
        digest = digests.setdefault(part, hashlib.sha256())
        digest.update(f"{inner} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return {part: digest.hexdigest()[:32] for part, digest in sorted(digests.items())}


def verify_fingerprints(folder: Path, variant: str | None = None, untrained: Collection[str] = ()) -> None:
    """Compare the weights in a folder with the fingerprints in its configuration, where it has them.

    Args:
        folder: with a config.json.
        variant: of the files with the weights.
        untrained: parts that are known not to be those that were saved.

    Raises:
        ValueError: a part whose weights are not those that were saved together with the others.
    """
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("fingerprints")
    if not saved:
        return
    found = fingerprint_parts(read_tensors(folder, variant))
    parts = {*saved, *found} - set(untrained)
    if changed := sorted(part for part in parts if saved.get(part) != found.get(part)):
        raise ValueError(
            f"In {str(folder)!r} the weights of {', '.join(changed)} are not those that were saved with this "
            "configuration: the file was damaged, or a part was exchanged for another. A projector and a language model "
            "work with the encoder that they were trained with; restore the file, or train the projector again and save "
            "the model with save_pretrained."
        )
