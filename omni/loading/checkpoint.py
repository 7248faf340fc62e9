"""A folder becomes a fused model and its processor, with adapters merged, or an error of one sentence."""

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from omni.checkpoints.fingerprints import expect_finite
from omni.checkpoints.folder import BASE, CheckpointError, base_of, expect_answers, new_folder, read_object, reason_of
from omni.checkpoints.seal import ADAPTER, verify_files
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.knowing.familiarity import Familiarity


def load(checkpoint: str | Path, dtype: str = "auto") -> tuple[OmniForConditionalGeneration, OmniProcessor]:
    """Load a fused model and its processor from a folder. Nothing is downloaded.

    Adapters, which a recipe with `lora` writes, are merged into their base model. The document `familiarity.json`
    (`omni.knowing`) becomes the model's `familiarity`.

    Args:
        checkpoint: the folder.
        dtype: the precision of all weights, such as "bfloat16"; "auto" for the checkpoint's own.

    Raises:
        CheckpointError: the folder does not exist or holds another kind of model; a file is missing, damaged or
            exchanged; or a part is untrained.
    """
    folder = Path(checkpoint)
    expect_answers(folder)
    base = base_of(folder)
    try:
        verify_files(folder, ADAPTER)
        processor = OmniProcessor.from_pretrained(folder)
        model = OmniForConditionalGeneration.from_pretrained(base, dtype=dtype)
        if base != folder:
            model = _with_adapters(model, folder)
        model.familiarity = Familiarity.read(folder)
    except CheckpointError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"The adapters in {str(folder)!r} are cut off or damaged ({error}); get the file again."
        ) from error
    except Exception as error:  # transformers and other libraries read the files, and may raise anything
        raise CheckpointError(f"The checkpoint {str(folder)!r} cannot be loaded: {reason_of(error)}") from error
    return model, processor


def _with_adapters(model: OmniForConditionalGeneration, folder: Path) -> OmniForConditionalGeneration:
    """The model with the adapters of a folder merged into its weights."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise CheckpointError(
            f"{str(folder)!r} holds adapters, for which peft is needed: pip install 'omni-thinker[train]'."
        ) from error
    trained_for: dict[str, Any] = (
        read_object(folder / BASE) if (folder / BASE).is_file() else model.config.fingerprints or {}
    )
    found = model.config.fingerprints or {}
    if others := sorted(part for part in found if trained_for.get(part) != found[part]):
        raise ValueError(
            f"its adapters were trained for other weights of {', '.join(others)} than those in "
            f"{model.config.name_or_path!r}; put the model back that they were trained for, or train them again."
        )
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
        expect_finite({name: file.get_tensor(name) for name in saved}, repr(str(folder)))
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about how peft calls transformers
            adapted = PeftModel.from_pretrained(model, folder)
    except RuntimeError as error:  # tensors of other shapes
        raise ValueError(str(error)) from error
    if apart := sorted(saved ^ get_peft_model_state_dict(adapted).keys()):
        raise ValueError(f"its tensors are not those of the model; missing or unexpected: {', '.join(apart[:5])}.")
    merged: OmniForConditionalGeneration = adapted.merge_and_unload()
    merged.config.name_or_path = str(folder)
    learnt = adapted.active_peft_config.modules_to_save or []
    rest = [part for part in merged.config.untrained or [] if part not in learnt]
    noted = trained_for.get("untrained")
    merged.config.untrained = noted if isinstance(noted, list) else rest
    return merged


def save_new(model: OmniForConditionalGeneration, processor: OmniProcessor, folder: str | Path) -> Path:
    """Write a checkpoint into a new folder, which appears only when it is complete.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        if model.familiarity is not None:
            model.familiarity.write(unfinished)
    return Path(folder)
