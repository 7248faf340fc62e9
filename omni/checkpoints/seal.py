"""A seal: the hashes of all files of a checkpoint folder that answers depend on, except the weights.

A bit that flips in a tokenizer, a chat template, the mean of an image processor or an epsilon of the configuration changes
answers silently. So saving writes the hashes of the files beside them, and loading anything from the folder compares all
of them. The weights have fingerprints instead, in config.json (`fingerprints.py`).

Model and processor are saved separately, in either order. So each has its own seal (`SEALS`). A configuration is compared by
content: the order of its keys, its spaces, and the place where a tokenizer was found do not count. Any other file is
compared by its bytes.
"""

import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omni.files import write_text_whole

from .folder import (
    ADAPTERS,
    BASE,
    CONFIG,
    FAMILIARITY,
    CheckpointError,
    expect_description,
    expect_folder,
    named,
    read_object,
)

MODEL, PROCESSOR, PREPROCESSOR, ADAPTER, KNOWING = (
    "seal.json",
    "processor_seal.json",
    "preprocessor_seal.json",
    "adapter_seal.json",
    "familiarity_seal.json",
)
GENERATION = "generation_config.json"
TEMPLATES = "additional_chat_templates"
SEALS: dict[str, tuple[str, ...]] = {
    MODEL: (CONFIG, GENERATION, "model.safetensors.index*.json"),
    PROCESSOR: (
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        f"{TEMPLATES}/*.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
        # vocabularies of tokenizers that have no tokenizer.json
        "*.model",
        "*.codes",
        "*.tiktoken",
        "*vocab*.json",
        "merges.txt",
        "vocab.txt",
        "tekken.json",
    ),
    PREPROCESSOR: ("preprocessor_config.json",),
    ADAPTER: (ADAPTERS, "adapter_model.safetensors", BASE),
    KNOWING: (FAMILIARITY,),
}
"""For each seal, the files that it covers if they exist."""

DESCRIPTIONS = (CONFIG, "processor_config.json", "preprocessor_config.json")
"""Files that a model is built from. Other files may hold numbers of any size."""

HOW_FOUND = ("is_local", "local_files_only")
"""Keys that transformers adds to a tokenizer's configuration about the place it was loaded from. Nothing reads them."""


def seal(folder: str | Path, kind: str) -> None:
    """Write the seal of this kind for the present files of a folder.

    Raises:
        CheckpointError: a file cannot be read.
    """
    folder = Path(folder)
    _write(folder / kind, {name: _digest(folder / name) for name in _members(folder, kind)}, [])


def reseal(folder: Path, parts: Mapping[str, str] | None = None) -> dict[str, str]:
    """Seal a folder again after its files were changed on purpose. The seals note the changes and the day.

    Args:
        folder: the folder of a checkpoint.
        parts: for each part whose weights changed, its earlier fingerprint.

    Returns:
        What happened to each file since it was sealed: "changed", "removed", or "sealed" for the first time.

    Raises:
        CheckpointError: this is no folder of a checkpoint, or a file cannot be read.
    """
    expect_folder(folder)
    today, happened = datetime.datetime.now(datetime.UTC).date().isoformat(), dict[str, str]()
    for kind in SEALS:
        members = _members(folder, kind)
        if not members and not (folder / kind).exists():
            continue
        try:
            before, notes = _read(folder / kind) if (folder / kind).exists() else ({}, [])
        except CheckpointError:
            before, notes = {}, []
            happened[kind] = "changed"
        now = {name: _digest(folder / name) for name in members}
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                happened[name] = "removed" if name not in now else "changed" if name in before else "sealed"
                if name in before:
                    notes.append({"date": today, "file": name, "was": before[name]})
        if kind == MODEL:
            notes += [{"date": today, "part": part, "was": was} for part, was in (parts or {}).items()]
        _write(folder / kind, now, notes)
    if not any((folder / kind).exists() for kind in SEALS):
        raise CheckpointError(f"{named(folder)} holds no file of a checkpoint; expected the folder of a saved model.")
    return happened


# --- Comparison -------------------------------------------------------------------------------------------------------


def verify_files(name: Any, kind: str, /, **place: Any) -> None:
    """Check that the files of a checkpoint have not changed since they were sealed.

    In a folder all seals are compared; in a repository on the hub, that of this kind. Files without a seal must be readable.

    Args:
        name: a folder or a name on the hub, as `from_pretrained` takes it.
        kind: the seal of the files that are about to be loaded.
        place: arguments of `from_pretrained` that say where the files are: `subfolder`, `revision`, ...

    Raises:
        CheckpointError: a file is damaged, changed, missing or new; the message names it.
    """
    if not os.path.isdir(name):
        return _verify_on_hub(name, kind, place)
    folder = Path(name) / (place.get("subfolder") or "")
    expect_folder(folder)
    problems: list[str] = []
    for each in SEALS:
        members = _members(folder, each)
        if (folder / each).exists():
            sealed, _ = _read(folder / each)
            problems += [f"{file} is missing" for file in sorted(sealed) if file not in members]
            new = [file for file in members if file not in sealed]
            problems += [f"{file} was not there" for file in new if file in SEALS[each] or file.startswith(TEMPLATES)]
            changed = [file for file in members if file in sealed and _digest(folder / file) != sealed[file]]
            problems += [f"{file} is damaged or changed" for file in changed]
        else:
            for file in members:
                if file.endswith(".json"):
                    read_object(folder / file)
    if problems:
        raise CheckpointError(
            f"The checkpoint {named(folder)} is not as it was saved: {', '.join(problems)}; get it again, or, if that is "
            f"meant, run `omni checkpoint seal {shlex.quote(str(folder))}`."
        )
    for file in DESCRIPTIONS:
        if (folder / file).exists():
            expect_description(read_object(folder / file), folder / file)
    return None


def _verify_on_hub(name: Any, kind: str, place: Mapping[str, Any]) -> None:
    if (path := on_hub(name, kind, place)) is not None:
        sealed, _ = _read(path)
        found = {file: on_hub(name, file, place) for file in sorted(sealed)}
        if changed := [file for file, path in found.items() if path is not None and _digest(path) != sealed[file]]:
            raise CheckpointError(
                f"The checkpoint {str(name)!r} is not as it was saved: {', '.join(changed)} is damaged or changed; get it "
                "again, or another revision of it."
            )


def on_hub(name: Any, file: str, place: Mapping[str, Any]) -> Path | None:
    """The local path of a file in a repository on the hub, which is fetched if needed; None if there is no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    keys = ("subfolder", "revision", "token", "cache_dir", "force_download", "local_files_only")
    options = {key: place[key] for key in keys if place.get(key)}
    try:
        return Path(hf_hub_download(str(name), file, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):  # transformers says what is wrong
        return None


# --- Files ------------------------------------------------------------------------------------------------------------


def _members(folder: Path, kind: str) -> list[str]:
    """The files of a folder that a seal of this kind covers, as paths relative to the folder."""
    names = [path.name for path in folder.iterdir()]
    names += [f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*")]
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in SEALS[kind]))


def _digest(path: Path) -> str:
    """A hash of a configuration's content, or of the bytes of any other file."""
    try:
        if path.name.endswith("config.json"):
            values = {key: value for key, value in read_object(path).items() if key not in HOW_FOUND}
            return _sha256(json.dumps(values, sort_keys=True))
        if not path.is_file():
            raise CheckpointError(f"{named(path)} is not a file.")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except RecursionError:
        raise CheckpointError(f"{named(path)} is nested too deep to be read; get the checkpoint again.") from None
    except OSError as error:
        raise CheckpointError(f"{named(path)} cannot be read ({error}); get the checkpoint again.") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _render(files: Any, changed: Any) -> str:
    """The text of a seal: the hash of each file, the changes made on purpose, and a hash of both."""
    content = {"changed": changed, "files": files}
    return (
        json.dumps({**content, "seal": _sha256(json.dumps(content, sort_keys=True))}, indent=2, sort_keys=True) + "\n"
    )


def _write(path: Path, files: Mapping[str, str], changed: list[dict[str, str]]) -> None:
    write_text_whole(path, _render(files, changed))


def _read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    values = read_object(path)
    files, changed = values.get("files"), values.get("changed")
    whole = isinstance(files, dict) and isinstance(changed, list)
    if not whole or path.read_text(encoding="utf-8") != _render(files, changed):
        raise CheckpointError(
            f"{named(path)} is damaged; get the checkpoint again, or, if all other files are as they should be, run "
            f"`omni checkpoint seal {shlex.quote(str(path.parent))}`."
        )
    return values["files"], values["changed"]
