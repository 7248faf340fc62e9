"""The parts that micro-Omni and omni both have: their names, their classes, and the result of a conversion."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from omni.exchange.micro_omni.files import (
    Tensors,
)
from omni.exchange.micro_omni.weights import (
    EMBEDDING,
    HEAD,
)
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.registry import get_modality

ENCODER, AUDIO, THINKER, TOKENS = "vision_encoder", "audio_encoder", "thinker", "image_token"
"""The parts of micro-Omni that omni has too; and the rows of embedding and head that only omni has, for placeholders."""
SENSES = {"image": (ENCODER, "proj_v", "cls"), "audio": (AUDIO, "proj_a", "grid")}
"""For each modality its encoder, its linear projector, and the tokens that the projector reads."""
LANGUAGE_MODEL = "model.language_model."
ROWS = {"embedding": EMBEDDING, "head": HEAD}
ENCODERS = {"image": "omni_vision", "audio": "omni_audio"}
CLASSES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    ENCODERS["image"]: (lambda: get_modality("image").config_class, lambda: get_modality("image").model_class),
    ENCODERS["audio"]: (lambda: get_modality("audio").config_class, lambda: get_modality("audio").model_class),
    LlamaConfig.model_type: (lambda: LlamaConfig, lambda: LlamaForCausalLM),
    OmniConfig.model_type: (lambda: OmniConfig, lambda: OmniForConditionalGeneration),
}
"""Configuration and model class for each type of checkpoint that micro-Omni can take. They are loaded when needed."""


class Conversion(BaseModel):
    """The result of a conversion.

    Attributes:
        output: the file or folder that was written.
        model: the class that loads it, or "micro-Omni".
        parameters: number of parameters of each part.
        kept: parts that the model does not have. They are kept unchanged in a file beside it.
        left: entries that were left behind, such as the state of an optimizer.
        notes: assumptions, and what users of the result need to know.
        files: the files that were read.
    """

    model_config = ConfigDict(frozen=True)

    output: str
    model: str
    parameters: dict[str, int]
    kept: list[str] = []
    left: list[str] = []
    notes: list[str] = []
    files: list[str] = []


def features(section: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the feature extractor. Those without a key in micro-Omni's configuration are fixed in its code."""
    return {
        "sampling_rate": section.get("sample_rate", 16_000),
        "n_fft": 1024,
        "win_length": section.get("frame_win", 400),
        "hop_length": section.get("frame_hop", 160),
        "num_mel_bins": section.get("mel_bins", 128),
        "mel_scale": "htk",
        "log_mel": False,
        "do_normalize": False,
    }


def build(model_class: Any, config: Any) -> PreTrainedModel:
    """A model on the meta device, which has shapes and takes no memory."""
    with torch.device("meta"):
        built: PreTrainedModel = model_class(config)
    return built


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a model."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def count(tensors: Tensors) -> int:
    """The number of parameters."""
    return sum(tensor.numel() for tensor in tensors.values())
