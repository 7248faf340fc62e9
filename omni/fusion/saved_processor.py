"""A processor on disk: the content of processor_config.json, and whether it fits the model beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import is_torchvision_available

from omni.modality import Modality

from .configuration_omni import OmniConfig

SHOWN_AS = {"image_processor": "image", "feature_extractor": "audio"}
"""transformers' names of preprocessors, as attributes and in processor_config.json, with their modality."""

TYPES = ("image_processor_type", "feature_extractor_type")
"""Keys under which preprocessors of transformers save the name of their class."""


def as_json(plan: OmniConfig) -> dict[str, Any]:
    """The sections of a configuration as they stand in processor_config.json, each with its encoder."""
    values = plan.to_diff_dict()
    sections = {
        name: {**section, "encoder": values[f"{name}_config"]} for name, section in values["modalities"].items()
    }
    return json.loads(json.dumps(sections))


def preprocessor_key(name: str) -> str:
    """The key of a modality's preprocessor in processor_config.json."""
    return next((shown for shown, modality in SHOWN_AS.items() if modality == name), f"{name}_preprocessor")


def plain(value: Any) -> Any:
    """numpy scalars and arrays, enumerations and mappings as JSON."""
    return value.tolist() if hasattr(value, "tolist") else dict(value) if isinstance(value, Mapping) else str(value)


def load_preprocessor(modality: Modality, saved: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Build the saved preprocessor, of the registered class or of one of transformers.

    Raises:
        ValueError: its class is neither.
    """
    values = {key: overrides.get(key, value) for key, value in saved.items() if key != "preprocessor_class"}
    name = next((saved[key] for key in ("preprocessor_class", *TYPES) if saved.get(key)), None)
    registered = modality.preprocessor_class
    if not is_torchvision_available() and hasattr(transformers, f"{name}Pil"):  # two classes are saved under one name
        name = f"{name}Pil"
    cls = registered if name in (registered.__name__, None) else getattr(transformers, name, None)
    if cls is None:
        raise ValueError(
            f"The preprocessor of modality {modality.name!r} was saved as {name}, but the registered one is "
            f"{registered.__name__} and transformers knows no {name}. Register the plug-in that the checkpoint was "
            "made with."
        )
    return cls(**values)


def compare_with_model(plan: OmniConfig, folder: Path, left_out: set[str]) -> None:
    """Check that a processor and the model configuration in its folder agree on the token plan.

    Raises:
        ValueError: they do not; the message names the keys.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") != OmniConfig.model_type:
        return
    model = OmniConfig.from_dict(config, modalities=dict.fromkeys(left_out))
    ours, theirs = _sizes(plan), _sizes(model)
    if apart := sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)):
        raise ValueError(
            f"In {str(folder)!r} processor and model disagree: processor_config.json and the tokenizer say "
            f"{ {key: ours.get(key) for key in apart} }, config.json says { {key: theirs.get(key) for key in apart} }. They "
            "were not saved together."
        )


def _sizes(plan: OmniConfig) -> dict[str, Any]:
    """The numbers that the token plan depends on: a section's settings and its encoder's integers."""
    sizes: dict[str, Any] = {}
    for name, section in plan.modalities.items():
        values = {**section, **section["encoder"].to_dict()}
        sizes |= {f"{name}.{key}": value for key, value in values.items() if key in section or type(value) is int}
        del sizes[f"{name}.encoder"]
    return sizes
