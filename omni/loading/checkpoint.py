"""A folder becomes a fused model and its processor, adapters merged; or one sentence says why not."""

import json
import os
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from omni.checkpoints.strict import CheckpointError
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor

ADAPTERS = "adapter_config.json"
"""Of peft: what its adapters are, and for which model."""
BASE = "base_fingerprints.json"
"""Beside adapters that a recipe trained: the fingerprints of their model's parts, as in its configuration."""


def load(checkpoint: str | Path) -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """Load a fused model and its processor from a folder; nothing is fetched from anywhere.

    Adapters, as a recipe with `lora` leaves them, are merged into the model that they were trained for.

    Raises:
        CheckpointError: no such folder, another kind of model in it, a file of it missing, damaged or a stranger's, or
            parts that were never trained.
    """
    folder = Path(checkpoint)
    base = base_of(folder)
    kind = model_type_of(base)
    for path in sorted({*folder.glob("*.json"), *base.glob("*.json")}):
        _read_object(path)
    if kind != OmniConfig.model_type:
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds a model of type {kind!r}, which does not answer questions; expected "
            f"a fused model, of type {OmniConfig.model_type!r}."
        )
    learnt = _learnt(folder) if base != folder else ()
    try:
        random = [part for part in OmniConfig.from_pretrained(base).untrained or [] if part not in learnt]
        if random:  # before anything large is read
            raise ValueError(f"{', '.join(random)} is untrained, so what it would say means nothing; train it first.")
        processor = OmniProcessor.from_pretrained(folder)
        model = OmniForConditionalGeneration.from_pretrained(base)
        if base != folder:
            model = _with_adapters(model, folder)
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights in {str(folder)!r} are cut off or damaged ({error}); get the file again."
        ) from error
    except (ValueError, OSError, StrictDataclassError) as error:
        raise CheckpointError(f"The checkpoint {str(folder)!r} cannot be loaded: {error}") from error
    return model, processor


def base_of(folder: Path) -> Path:
    """The folder itself; if it holds adapters and no model, the folder of the model that they were trained for.

    Raises:
        CheckpointError: that model is not where the adapters say.
    """
    if (folder / "config.json").is_file() or not (folder / ADAPTERS).is_file():
        return folder
    base = Path(str(_read_object(folder / ADAPTERS).get("base_model_name_or_path")))
    if not (base / "config.json").is_file():
        where = "" if base.is_absolute() else f" in {os.getcwd()!r}"
        raise CheckpointError(
            f"The adapters in {str(folder)!r} were trained for the model {str(base)!r}, which is not there{where}; put it "
            f"back, or correct base_model_name_or_path in {ADAPTERS}."
        )
    return base


def model_type_of(folder: Path) -> str:
    """The `model_type` that config.json in a folder names.

    Raises:
        CheckpointError: no folder, no config.json in it, or one that names none.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = "has no config.json" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"The checkpoint {str(folder)!r} {found}; expected the folder of a saved model.")
    values = _read_object(path)
    if not isinstance(values.get("model_type"), str):
        raise CheckpointError(f"{str(path)!r} names no model_type; get the checkpoint again.")
    return str(values["model_type"])


def expect_model(folder: str | Path, *kinds: str) -> None:
    """Refuse a folder with a model of another `model_type` than these.

    Raises:
        CheckpointError: such a model, or none.
    """
    if (found := model_type_of(Path(folder))) not in kinds:
        expected = " or ".join(map(repr, kinds))
        raise CheckpointError(
            f"The checkpoint {str(folder)!r} holds a model of type {found!r}; name the folder of one of type {expected}."
        )


def _with_adapters(model: OmniForConditionalGeneration, folder: Path) -> OmniForConditionalGeneration:
    """The model with the adapters of a folder merged into its weights."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise CheckpointError(
            f"{str(folder)!r} holds adapters, for which peft is needed: pip install 'omni-thinker[train]'."
        ) from error
    trained_for = _read_object(folder / BASE) if (folder / BASE).is_file() else model.config.fingerprints or {}
    found = model.config.fingerprints or {}
    if others := sorted(part for part in found if trained_for.get(part) != found[part]):
        raise ValueError(
            f"its adapters were trained for other weights of {', '.join(others)} than those in "
            f"{model.config.name_or_path!r}; put the model back that they were trained for, or train them again."
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except RuntimeError as error:  # tensors of other shapes
        raise ValueError(str(error)) from error
    if apart := sorted(saved ^ get_peft_model_state_dict(adapted).keys()):
        raise ValueError(f"its tensors are not those of the model; missing or unexpected: {', '.join(apart[:5])}.")
    merged: OmniForConditionalGeneration = adapted.merge_and_unload()
    merged.config.name_or_path = str(folder)
    learnt = _learnt(folder)
    merged.config.untrained = [part for part in merged.config.untrained or [] if part not in learnt]
    return merged


def _learnt(folder: Path) -> list[str]:
    """The parts that adapters bring whole, with weights of their own."""
    learnt = _read_object(folder / ADAPTERS).get("modules_to_save")
    return [str(part) for part in learnt] if isinstance(learnt, list) else []


def _read_object(path: Path) -> dict[str, object]:
    """A JSON file of a checkpoint; transformers passes over some that are cut off, or names another cause."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged ({error}); get the checkpoint again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(path)!r} should hold a JSON object, found a {type(values).__name__}.")
    return values
