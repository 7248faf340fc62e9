"""Low-rank adapters (LoRA) of peft, and the base model that they belong to."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from omni.checkpoints.folder import BASE
from omni.checkpoints.seal import ADAPTER, seal
from omni.files import write_text_whole
from omni.training.recipe import RecipeError
from omni.training.sections import Lora


def add_adapters(model: nn.Module, settings: Lora) -> nn.Module:
    """The model with low-rank adapters. Only these, and `modules_to_save`, are trained.

    Raises:
        RecipeError: peft is not installed, or the settings do not fit the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from peft.utils.constants import EMBEDDING_LAYER_NAMES
    except ImportError as error:
        raise RecipeError("`lora` in a recipe needs peft: pip install 'omni-thinker[train]'.") from error
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        modules_to_save=list(settings.modules_to_save) or None,  # a copy: peft adds tied modules to the list
        # otherwise the head would keep the old weights of a trained embedding that it is tied to
        ensure_weight_tying=bool(getattr(model.config, "tie_word_embeddings", False))
        and any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in settings.modules_to_save),
    )
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about how peft calls transformers
            return get_peft_model(model, config)
    except ValueError as error:  # a pattern that matches no module
        raise RecipeError(f"`lora` of the recipe does not fit the model: {error}") from error


def note_base(model: nn.Module, folder: Path) -> None:
    """Write beside adapters the fingerprints of their base model and its untrained parts, and seal the folder.

    Does nothing for a model without adapters.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(model, "peft_config") and config.fingerprints:
        noted = {**config.fingerprints, "untrained": config.untrained or []}
        write_text_whole(folder / BASE, json.dumps(noted, indent=2))
    if hasattr(model, "peft_config"):
        seal(folder, ADAPTER)
