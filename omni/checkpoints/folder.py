"""Careful reading of the files in a checkpoint folder, before anything heavy is imported or built.

A folder may come from anywhere. It may hold a pipe that never ends, JSON that is nested a hundred thousand times, or sizes
that fit into no memory. Each of these is an error of one sentence.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omni.files import read_json

CONFIG = "config.json"
ADAPTERS = "adapter_config.json"
"""peft's file about adapters. It names the model that they are for."""
BASE = "base_fingerprints.json"
"""A file beside adapters that a recipe trained. It holds the fingerprints of their model's parts, and under "untrained" the
parts that are still random."""

CLASSIFIER = "omni_classifier"
"""The `model_type` of a classifier, see `omni.classification`."""

FAMILIARITY = "familiarity.json"
"""Statistics of the training data; see `omni.knowing`."""

MOST_LAYERS = 10_000
LAYERS = re.compile(r"(layers?|blocks?|depths?|stages?)$")
"""Ends of the keys that count layers in a configuration."""
LONGEST_SIDE = 100_000
SIDES = re.compile(r"(^|\.)(size|crop_size)(\.height|\.width)?$")
"""Keys of an image processor for the size of its output, in pixels."""
SECTIONS = re.compile(r"^(modalities(\.[^.]+(\.encoder)?)?|image_processor)$|(_preprocessor|_config)$")
"""Keys of a configuration that hold the configuration of a part."""


class CheckpointError(ValueError):
    """A folder cannot be used. The message says which, why, and what to do."""


# --- Files ------------------------------------------------------------------------------------------------------------


def expect_folder(folder: Path) -> None:
    """Check that this is a folder, and that it holds nothing but files and folders.

    Raises:
        CheckpointError: it is no folder, or it holds a pipe, a device or a link to nothing.
    """
    try:
        strange = [entry.name for entry in os.scandir(folder) if not (entry.is_file() or entry.is_dir())]
    except FileNotFoundError:
        raise CheckpointError(
            f"The checkpoint {named(folder)} does not exist; expected the folder of a saved model."
        ) from None
    except NotADirectoryError:
        raise CheckpointError(
            f"The checkpoint {named(folder)} is a file; expected the folder of a saved model."
        ) from None
    except (OSError, ValueError) as error:  # the name may be too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"The checkpoint {named(folder)} cannot be looked at ({reason}); expected the folder of a saved model."
        ) from error
    if strange:
        raise CheckpointError(
            f"In {named(folder)} {', '.join(map(repr, sorted(strange)))} is a pipe, a device or a link to nothing; expected "
            "files."
        )


def named(path: Path) -> str:
    """A path as a message quotes it. Of a very long path it quotes both ends."""
    text = str(path)
    return repr(text if len(text) <= 300 else f"{text[:100]}...{text[-100:]}")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint. transformers ignores some damaged files, or reports another cause.

    Raises:
        CheckpointError: the file cannot be read, is no JSON, or holds no object.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{named(path)} is not a file; expected one with a JSON object.")
        values = read_json(path)
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{named(path)} is damaged ({error}); get the checkpoint again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{named(path)} should hold a JSON object, found a {type(values).__name__}.")
    return values


def reason_of(error: Exception) -> str:
    """An error's message in one line, after the name of its class if the message is not meant for users."""
    said = " ".join(str(error).split())
    for_people = isinstance(error, (ValueError, OSError)) or type(error).__name__.startswith("StrictDataclass")
    return said if for_people and said else f"{type(error).__name__}, {said}"


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        CheckpointError: there is none, or it describes no model; see `expect_description`.
    """
    expect_folder(folder)
    path = folder / CONFIG
    if not os.path.exists(path):
        raise CheckpointError(
            f"The checkpoint {named(folder)} has no config.json; expected the folder of a saved model."
        )
    values = read_object(path)
    expect_description(values, path)
    return values


def expect_description(values: dict[str, Any], path: Path) -> None:
    """Check that a configuration can describe a model, before anything is built from it.

    Raises:
        CheckpointError: a section is no object, a model_type is no text, there are more layers than `MOST_LAYERS`,
            pictures are larger than `LONGEST_SIDE`, or a whole number has more than 64 bits.
    """
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        key, value = waiting.pop()
        expected = None
        if SECTIONS.search(key) and not isinstance(value, dict | None):
            expected = "an object"
        elif key.endswith("model_type") and not isinstance(value, str):
            expected = "a name"
        elif isinstance(value, int | float) and LAYERS.search(key) and value > MOST_LAYERS:
            expected = f"at most {MOST_LAYERS:,}"
        elif isinstance(value, int | float) and SIDES.search(key) and not value <= LONGEST_SIDE:
            expected = f"at most {LONGEST_SIDE:,}"
        elif isinstance(value, int) and abs(value) >= 2**63:
            expected = "a number of at most 64 bits"
        if expected is not None:
            raise CheckpointError(f"{named(path)} has {_shown(value)} as {key!r}; expected {expected}.")
        if isinstance(value, dict):
            waiting += [(f"{key}.{name}".lstrip("."), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def expect_new(folder: str | Path) -> Path:
    """Check that a checkpoint can be written to a folder without replacing anything, and return the folder as a path.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"Expected a new folder, but {str(folder)!r} exists already; name another, or remove it.")
    return folder


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to write into. It gets its name at the end; if writing fails, no folder of that name appears.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    folder = expect_new(folder)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    if folder.exists():
        folder.rmdir()
    os.replace(unfinished, folder)


# --- Models -----------------------------------------------------------------------------------------------------------


def base_of(folder: Path) -> Path:
    """The folder with the model: this one, or, if it holds only adapters, the folder of their base model.

    Raises:
        CheckpointError: this is no folder, or the model is not where the adapters say.
    """
    expect_folder(folder)
    if os.path.exists(folder / CONFIG) or not os.path.exists(folder / ADAPTERS):
        return folder
    base = Path(str(read_object(folder / ADAPTERS).get("base_model_name_or_path")))
    if not os.path.isfile(base / CONFIG):
        where = "" if base.is_absolute() else f" in {os.getcwd()!r}"
        raise CheckpointError(
            f"The adapters in {named(folder)} were trained for the model {named(base)}, which is not there{where}; put it "
            f"back, or correct base_model_name_or_path in {ADAPTERS}."
        )
    return base


def model_type_of(folder: Path) -> str:
    """The `model_type` in the config.json of a folder.

    Raises:
        CheckpointError: this is no folder, it has no config.json, or config.json names no model_type.
    """
    found = read_config(folder).get("model_type")
    if not isinstance(found, str):
        raise CheckpointError(f"{named(folder / CONFIG)} names no model_type; get the checkpoint again.")
    return found


def expect_model(folder: str | Path, *kinds: str) -> None:
    """Check that a folder holds a model of one of these types.

    Raises:
        CheckpointError: it holds another model, or none.
    """
    if (found := model_type_of(Path(folder))) not in kinds:
        expected = " or ".join(map(repr, kinds))
        raise CheckpointError(
            f"The checkpoint {named(Path(folder))} holds a model of type {found!r}; name the folder of one of type "
            f"{expected}."
        )


def expect_answers(folder: str | Path) -> None:
    """Check, by its JSON files alone, that the model in a folder can answer questions.

    Raises:
        CheckpointError: it is no fused model, or a part of it was never trained. Adapters may have trained a part.
    """
    folder = Path(folder)
    base = base_of(folder)
    if (kind := model_type_of(base)) != "omni":
        remedy = (
            'classify by pipeline("image-classification") of transformers, or name'
            if kind == CLASSIFIER
            else "expected"
        )
        raise CheckpointError(
            f"The checkpoint {named(folder)} holds a model of type {kind!r}, which does not answer questions; {remedy} a "
            "fused model, of type 'omni'."
        )
    untrained: Any = read_config(base).get("untrained")
    if base != folder:
        learnt: Any = read_object(folder / ADAPTERS).get("modules_to_save")
        if isinstance(learnt, list) and isinstance(untrained, list):
            untrained = [part for part in untrained if part not in learnt]
        if os.path.exists(folder / BASE):
            untrained = read_object(folder / BASE).get("untrained", untrained)
    if not isinstance(untrained, list | None):
        raise CheckpointError(
            f"In the checkpoint {named(folder)} {untrained!r} is said to be untrained; expected a list of parts."
        )
    if untrained:
        raise CheckpointError(
            f"In the checkpoint {named(folder)} {', '.join(map(str, untrained))} is untrained, so its answers would mean "
            "nothing; train it first."
        )


def modalities_of(folder: str | Path) -> list[str] | None:
    """The modalities that the fused model in a folder takes, if its config.json names them.

    Raises:
        CheckpointError: no model; see `base_of`.
    """
    sections = read_config(base_of(Path(folder))).get("modalities")
    return sorted(sections) if isinstance(sections, dict) else None


def prompt_of(folder: str | Path) -> str | None:
    """The most common question of training, if the processor in a folder has one.

    Raises:
        CheckpointError: processor_config.json cannot be read.
    """
    prompt = _processor(folder).get("prompt")
    return prompt if isinstance(prompt, str) else None


def asked_by(folder: str | Path) -> list[str]:
    """The modalities whose items may ask the model in a folder instead of words; see `OmniProcessor`.

    Raises:
        CheckpointError: processor_config.json cannot be read.
    """
    names = _processor(folder).get("asked_by")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _processor(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "processor_config.json"
    return read_object(path) if os.path.isfile(path) else {}
