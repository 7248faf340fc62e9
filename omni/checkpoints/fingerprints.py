"""The weights of a checkpoint on disk: what is in its files, and a hash by which a damaged or exchanged part is found.

A saved configuration carries a fingerprint of each part's weights, under `fingerprints`. Whoever loads the weights hashes
them again, part by part, and compares. Weights that are no numbers are refused with and without.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from omni.files import write_text_whole

from .folder import CONFIG, CheckpointError, named, read_object

# --- Files ------------------------------------------------------------------------------------------------------------


def read_tensors(folder: str | Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder as they stand in its safetensors file or shards (memory-mapped).

    Raises:
        CheckpointError: a file that is not whole.
        OSError: one that is not there.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in safetensors_files(Path(folder), variant):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(
                f"The weights in {named(file)} are cut off or damaged ({error}); get the file again."
            ) from error
    return tensors


def weights_file(folder: Path, variant: str | None) -> Path:
    """The one file with weights, or the index of several; `save_pretrained(variant="ema")` has its name in all of them."""
    middle = f".{variant}" if variant else ""
    index, whole = folder / f"model.safetensors.index{middle}.json", folder / f"model{middle}.safetensors"
    return index if index.exists() and not whole.exists() else whole


def safetensors_files(folder: Path, variant: str | None) -> list[Path]:
    """The one file with weights, or those that the index names.

    Raises:
        CheckpointError: an index that names none.
    """
    index = weights_file(folder, variant)
    if index.suffix != ".json":
        return [index]
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        type(name) is str and name == Path(name).name for name in shards.values()
    ):
        raise CheckpointError(f"{named(index)} names no files for its tensors; get the checkpoint again.")
    return sorted({folder / file for file in shards.values()})


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


def verify_weights(folder: Path, variant: str | None = None, untrained: Collection[str] = ()) -> None:
    """Compare the weights in a folder with the fingerprints in its configuration, where it has them, and see them finite.

    Args:
        folder: with a config.json.
        variant: of the files with the weights.
        untrained: parts that are known not to be those that were saved.

    Raises:
        ValueError: a part whose weights are not those that were saved together with the others, or a tensor with NaN or
            infinity in it.
    """
    if not weights_file(folder, variant).exists():  # of another format, which somebody has asked for
        return
    saved = read_object(folder / CONFIG).get("fingerprints")
    verify_tensors(read_tensors(folder, variant), saved, named(weights_file(folder, variant)), untrained)


def verify_tensors(
    tensors: Mapping[str, torch.Tensor], saved: Mapping[str, str] | None, file: str, untrained: Collection[str] = ()
) -> None:
    """The same for tensors by name and the fingerprints `saved` of their parts; `file` is where messages say they are."""
    if saved:
        found = fingerprint_parts(tensors)
        parts = {*saved, *found} - set(untrained)
        if changed := sorted(part for part in parts if saved.get(part) != found.get(part)):
            raise CheckpointError(
                f"The weights of {', '.join(changed)} in {file} are not those that were saved with this configuration: the "
                "file was damaged, or a part was exchanged for another. A projector and a language model "
                "work with the encoder that they were trained with; restore the file, or train the projector again and save "
                "the model with save_pretrained."
            )
    expect_finite(tensors, file)


def expect_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights with NaN or infinity in them, which turn every answer into nothing.

    Args:
        tensors: by name.
        where: they are, as the message quotes it.

    Raises:
        CheckpointError: such tensors, by name.
    """
    names = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(
            f"The weights {', '.join(names[:5])}{more} in {where} hold NaN or infinity: the training went astray, or the "
            "file is damaged; take a checkpoint from before."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.dtype.is_floating_point:
        return True
    wide = torch.promote_types(tensor.dtype, torch.float32) if tensor.dtype.itemsize > 1 else None
    # A sum is quick, and finite where all of its terms are, unless they are huge. Pieces this small are summed by one
    # core: the others may be busy, and would be waited for.
    for piece in torch.split(tensor.reshape(-1), 30_000):
        terms = piece.float() if wide is None else piece
        if not terms.sum(dtype=wide).isfinite() and not terms.isfinite().all():
            return False
    return True


def renew_fingerprints(folder: Path) -> dict[str, str]:
    """Write the fingerprints of a folder's weights as they are now into its config.json, if it is that of omni's model.

    Returns:
        Those that it had of the parts that are others now.

    Raises:
        CheckpointError: weights that cannot be read, or with NaN or infinity in them.
    """
    if not (folder / CONFIG).is_file():
        return {}
    values = read_object(folder / CONFIG)
    if not str(values.get("model_type")).startswith("omni"):
        return {}
    try:
        tensors = read_tensors(folder)
    except OSError as error:
        raise CheckpointError(f"The weights in {named(folder)} cannot be read ({error}).") from error
    expect_finite(tensors, named(weights_file(folder, None)))
    saved, found = values.get("fingerprints") or {}, fingerprint_parts(tensors)
    if saved != found:
        text = json.dumps({**values, "fingerprints": found}, indent=2, sort_keys=True) + "\n"
        write_text_whole(folder / CONFIG, text)
    return {part: mark for part, mark in saved.items() if found.get(part) != mark}
