"""The weights of a checkpoint on disk: reading them, and a hash that finds a damaged or exchanged part.

A saved configuration holds a fingerprint of each part's weights, under `fingerprints`. Loading hashes the weights again,
part by part, and compares. Weights with NaN or infinity are refused, even if there are no fingerprints.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from omni.files import write_text_whole

from .folder import CONFIG, CheckpointError, named, read_object

# --- Files ------------------------------------------------------------------------------------------------------------


def read_tensors(folder: str | Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors file or shards of a checkpoint folder (memory-mapped).

    Raises:
        CheckpointError: a file is damaged.
        OSError: a file is missing.
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


@contextmanager
def naming_weights(folder: str | Path) -> Iterator[None]:
    """Inside, others read the weights in a folder; of damaged ones the error names the file.

    Raises:
        CheckpointError: a file is damaged.
    """
    try:
        yield
    except SafetensorError:
        with suppress(OSError):
            read_tensors(folder)
        raise


def weights_file(folder: Path, variant: str | None) -> Path:
    """The file with the weights, or the index of several. The files of `save_pretrained(variant="ema")` end with "ema"."""
    middle = f".{variant}" if variant else ""
    index, whole = folder / f"model.safetensors.index{middle}.json", folder / f"model{middle}.safetensors"
    return index if index.exists() and not whole.exists() else whole


def safetensors_files(folder: Path, variant: str | None) -> list[Path]:
    """The file with the weights, or the files that the index names.

    Raises:
        CheckpointError: the index names no files.
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
    """For each part, a hash of its tensors' names, types, shapes and values.

    A tower has the fingerprint that the same encoder has when it is saved alone.
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
    """Compare the weights in a folder with the fingerprints in its configuration, and check that all are finite.

    Args:
        folder: the folder of a checkpoint.
        variant: the variant of the files with the weights, as in `from_pretrained`.
        untrained: parts that are not compared, since they are random.

    Raises:
        CheckpointError: a part's weights are not those that were saved with the others, or a tensor holds NaN or infinity.
    """
    if not weights_file(folder, variant).exists():  # the caller asked for weights in another format
        return
    saved = read_object(folder / CONFIG).get("fingerprints")
    verify_tensors(read_tensors(folder, variant), saved, named(weights_file(folder, variant)), untrained)


def verify_tensors(
    tensors: Mapping[str, torch.Tensor],
    saved: Mapping[str, str] | None,
    file: str,
    untrained: Collection[str] = (),
    elsewhere: Mapping[str, str] | None = None,
) -> None:
    """As `verify_weights`, for tensors in memory.

    Args:
        tensors: the tensors by name.
        saved: the fingerprints of their parts; None to check only that all are finite.
        file: where the tensors come from, for messages.
        untrained: parts that are not compared.
        elsewhere: the folders of parts that are in folders of their own, for messages.

    Raises:
        CheckpointError: see `verify_weights`.
    """
    if saved:
        found = fingerprint_parts(tensors)
        parts = {*saved, *found} - set(untrained)
        changed: dict[str, list[str]] = {}
        for part in sorted(part for part in parts if saved.get(part) != found.get(part)):
            place = (elsewhere or {}).get("language_model" if part == "lm_head" else part)
            changed.setdefault(named(weights_file(Path(place), None)) if place else file, []).append(part)
        if changed:
            which = " and ".join(f"{', '.join(parts)} in {where}" for where, parts in changed.items())
            raise CheckpointError(
                f"The weights of {which} are not those that were saved with this configuration: the "
                "file was damaged, or a part was exchanged for another. A projector and a language model "
                "work with the encoder that they were trained with; restore the file, or train the projector again and save "
                "the model with save_pretrained."
            )
    expect_finite(tensors, file)


def expect_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        tensors: the weights, by name.
        where: the file or folder, as the message quotes it.

    Raises:
        CheckpointError: some hold NaN or infinity; the message names them.
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
    # A sum is quick to compute, and finite if all of its terms are, unless they are huge. A piece of this size is summed
    # on one core, so that nothing waits for another core that is busy.
    for piece in torch.split(tensor.reshape(-1), 30_000):
        terms = piece.float() if wide is None else piece
        if not terms.sum(dtype=wide).isfinite() and not terms.isfinite().all():
            return False
    return True


def renew_fingerprints(folder: Path) -> dict[str, str]:
    """Write the fingerprints of a folder's present weights into its config.json, if that describes a model of omni.

    Parts in folders of their own keep the fingerprints that they had when the checkpoint was saved.

    Returns:
        The earlier fingerprints of the parts that have changed.

    Raises:
        CheckpointError: the weights cannot be read, or hold NaN or infinity.
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
    apart = set(values.get("parts_from") or ())
    apart |= {"lm_head"} if "language_model" in apart else set()
    found = {part: mark for part, mark in saved.items() if part in apart} | found
    if saved != found:
        text = json.dumps({**values, "fingerprints": found}, indent=2, sort_keys=True) + "\n"
        write_text_whole(folder / CONFIG, text)
    return {part: mark for part, mark in saved.items() if found.get(part) != mark}
