"""Loads and saves the preprocessor of an encoder in its own folder."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, FeatureExtractionMixin, ImageProcessingMixin

from omni.checkpoints.folder import CheckpointError, named, read_object
from omni.files import write_text_whole
from omni.modality import Modality

FILE = "preprocessor_config.json"
CLASS = "preprocessor_class"
"""The key for the name of a class that transformers does not know."""


def load_preprocessor(modality: Modality, folder: Path) -> Any:
    """The preprocessor in a folder, of the registered class or of a similar class of transformers.

    Raises:
        CheckpointError: there is none, or it has another class.
    """
    registered = modality.preprocessor_class
    if not any((folder / name).is_file() for name in (FILE, "processor_config.json")):
        raise CheckpointError(
            f"{named(folder)} has no {FILE}, which says how {modality.noun}s are prepared; save the encoder's preprocessor "
            "into it."
        )
    for auto, kind in ((AutoImageProcessor, ImageProcessingMixin), (AutoFeatureExtractor, FeatureExtractionMixin)):
        if issubclass(registered, kind):
            return auto.from_pretrained(folder, trust_remote_code=False)
    values = read_object(folder / FILE)
    if (name := values.pop(CLASS, registered.__name__)) != registered.__name__:
        raise CheckpointError(
            f"{named(folder / FILE)} is of a {name}, expected a {registered.__name__}, that of modality {modality.name!r}."
        )
    return registered(**values)


def save_preprocessor(preprocessor: Any, folder: Path) -> None:
    """Write preprocessor_config.json, by `save_pretrained` or else from `to_dict()`."""
    if hasattr(preprocessor, "save_pretrained"):
        preprocessor.save_pretrained(folder)
        return
    values = {**preprocessor.to_dict(), CLASS: type(preprocessor).__name__}
    write_text_whole(folder / FILE, json.dumps(values, indent=2, sort_keys=True) + "\n")
