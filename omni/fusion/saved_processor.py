"""A processor on disk: it is saved, loaded, and compared with the model beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import transformers
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from omni.checkpoints.cards import remote_code
from omni.checkpoints.seal import PROCESSOR, seal, verify_files
from omni.files import write_text_whole
from omni.modality import Modality
from omni.registry import get_modality

from .configuration_omni import OmniConfig

SHOWN_AS = {"image_processor": "image", "feature_extractor": "audio"}
"""transformers' names of preprocessors, as attributes and in processor_config.json, with their modality."""

TYPES = ("image_processor_type", "feature_extractor_type")
"""Keys under which preprocessors of transformers save the name of their class."""


class SavedProcessor(ProcessorMixin):
    """The half of `OmniProcessor` that saves and loads. Its other half sets the attributes."""

    tokenizer: Any
    chat_template: Any
    prompt: str | None
    asked_by: list[str]
    preprocessors: dict[str, Any]
    modalities: dict[str, Any]
    plan: OmniConfig

    def to_dict(self) -> dict[str, Any]:
        """The content of processor_config.json, under the keys where transformers' Auto classes look."""
        output: dict[str, Any] = {"processor_class": type(self).__name__, "modalities": self.modalities}
        if self.prompt is not None:
            output["prompt"] = self.prompt
        if self.asked_by:
            output["asked_by"] = self.asked_by
        for name, preprocessor in self.preprocessors.items():
            values = json.loads(json.dumps(preprocessor.to_dict(), default=plain))
            values.pop("auto_map", None)  # says where the class was found, and is no setting
            if not set(TYPES) & set(values):
                values["preprocessor_class"] = type(preprocessor).__name__
            output[preprocessor_key(name)] = values
        return output

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Does nothing, as for the models: see `StrictLoadingMixin`."""

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Write processor_config.json, the tokenizer's files and the chat template, and seal them."""
        if push_to_hub:
            raise ValueError(
                "Save into a folder first, then upload it, for example with huggingface_hub.upload_folder."
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        for key in ("is_local", "local_files_only"):  # transformers notes here where it found the tokenizer
            self.tokenizer.init_kwargs.pop(key, None)
        self.tokenizer.chat_template = self.chat_template  # it writes the template's files
        self.tokenizer.save_pretrained(folder)
        values = {**self.to_dict(), "auto_map": remote_code(folder, {"AutoProcessor": type(self).__name__})}
        for name, preprocessor in self.preprocessors.items():
            if found_as := getattr(preprocessor, "found_as", None):
                values[preprocessor_key(name)]["auto_map"] = remote_code(folder, found_as)
        path = folder / "processor_config.json"
        write_text_whole(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
        seal(folder, PROCESSOR)
        return [str(path)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load from a folder or hub name.

        Args:
            pretrained_model_name_or_path: the folder or name.
            kwargs: `modalities={"signal": None}` or `signal_config=None` leaves a modality out. Settings of preprocessors
                and tokenizer, and arguments of transformers, are passed on.

        Raises:
            ValueError: a file has changed since it was sealed; a plug-in is missing; the class of a saved preprocessor is
                unknown; or the token plan contradicts the model's configuration in the same folder.
        """
        verify_files(pretrained_model_name_or_path, PROCESSOR, **kwargs)
        left_out = set(OmniConfig.names_left_out(kwargs))
        kwargs = {key: value for key, value in kwargs.items() if key != "modalities" and not key.endswith("_config")}
        own = (*SHOWN_AS, "tokenizer", "chat_template", "prompt", "asked_by")
        overrides = {key: kwargs.pop(key) for key in own if key in kwargs}
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "modalities" not in saved:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds no processor_config.json of an OmniProcessor."
            )
        sections = {name: section for name, section in saved["modalities"].items() if name not in left_out}
        preprocessors = {
            name: load_preprocessor(get_modality(name), saved[preprocessor_key(name)], kwargs)
            for name in sections
            if name not in {SHOWN_AS.get(key) for key in overrides}
        }
        tokenizer = overrides.pop("tokenizer", None) or AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, **{"trust_remote_code": False, **kwargs}
        )
        overrides |= {key: saved.get(key) for key in ("chat_template", "prompt", "asked_by") if key not in overrides}
        if left_out & {*(overrides["asked_by"] or [])}:  # the modality that asks is left out
            overrides["asked_by"] = None
        processor = cls(tokenizer=tokenizer, preprocessors=preprocessors, modalities=sections, **overrides)
        compare_with_model(processor.plan, Path(pretrained_model_name_or_path) / kwargs.get("subfolder", ""), left_out)
        return processor


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
