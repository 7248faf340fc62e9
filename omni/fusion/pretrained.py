"""What transformers has to know about the fused model, and what the model returns. Nothing here computes."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from omni.checkpoints.pretrained import StrictModel

from .configuration_omni import OmniConfig
from .head import note_ties
from .parts import gather, kept_apart
from .quantization import spare_small_parts
from .signature import CACHE


@dataclass
class OmniModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `OmniModel`: the Thinker's, and what was placed.

    Attributes:
        last_hidden_state: float[B, L, T].
        encoder_hidden_states: for each modality present, its projected tokens, float[sum of n_i, T].
    """

    encoder_hidden_states: dict[str, torch.Tensor] | None = None


@dataclass
class OmniCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `OmniForConditionalGeneration`.

    Attributes:
        loss: float, mean over the labelled tokens; None without labels.
        logits: float[B, L, V], or of the positions asked for by `logits_to_keep`.
        encoder_hidden_states: for each modality present, its projected tokens, float[sum of n_i, T].
    """

    encoder_hidden_states: dict[str, torch.Tensor] | None = None


class OmniPreTrainedModel(StrictModel):
    """Base of the fused model's classes. Towers and Thinker are models of their own and describe themselves."""

    config: OmniConfig
    config_class = OmniConfig
    base_model_prefix = "model"
    found_as = {
        "AutoConfig": "OmniConfig",
        "AutoModel": "OmniModel",
        "AutoModelForImageTextToText": "OmniForConditionalGeneration",
        "AutoModelForMultimodalLM": "OmniForConditionalGeneration",
        "AutoProcessor": "OmniProcessor",
    }
    input_modalities = ("image", "text")
    familiarity: Any = None
    """Statistics of the training data, an `omni.knowing.familiarity.Familiarity`; None if there are none."""
    _skip_keys_device_placement = [CACHE]

    def __init__(self, config: OmniConfig) -> None:
        super().__init__(config)
        self.input_modalities = (*config.modalities, "text")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As `StrictLoadingMixin.from_pretrained`. Parts may come from their own folders, see `parts.py`.

        A `quantization_config` is applied to the Thinker, see `spare_small_parts`.
        """
        if (quantization := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = spare_small_parts(quantization)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def tensors_of_others(cls, kwargs: Mapping[str, Any]) -> re.Pattern[str]:
        """As in the base class, and the tensors of modalities that are left out."""
        left_out = OmniConfig.names_left_out(kwargs)
        parts = [cls.left_to_others.pattern, *(rf"(model\.)?{name}_(tower|projector)\." for name in left_out)]
        return re.compile("|".join(parts))

    @classmethod
    def gather(cls, folder: Path, kwargs: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        """See `StrictLoadingMixin.gather`."""
        return gather(cls, folder, kwargs)

    @contextmanager
    def apart(self, tensors: Mapping[str, torch.Tensor], save_directory: Any) -> Iterator[dict[str, dict[str, str]]]:
        """See `StrictLoadingMixin.apart`."""
        with kept_apart(self.config, tensors, Path(save_directory)) as apart:
            yield apart

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As `StrictLoadingMixin.save_pretrained`, after `tie_word_embeddings` is set by the weights."""
        note_ties(self)
        return super().save_pretrained(*args, **kwargs)

    def train(self, mode: bool = True) -> "OmniPreTrainedModel":
        """Set training mode. A part that is frozen as a whole stays in eval mode, without dropout."""
        super().train(mode)
        for part in self.children() if mode else ():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        return self
