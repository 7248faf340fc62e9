"""Audio encoders of transformers in the place of omni's: the same arguments, and the same named outputs.

    WhisperEncoder      input_features float[I, M, F]                    without the decoder that AutoModel would build, too
    ASTModel            input_values float[I, F, M]                      without a mask
    Wav2Vec2Model, ...  input_values float[I, S], attention_mask         the mask only where it was trained with one

A tower is a subclass of the model, so its tensors have the names that they have there.
"""

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

from omni.audio.lengths import SPECTROGRAM, WHISPER, hears_samples, num_tokens
from omni.audio.modeling_audio import OmniAudioOutput


def build_tower(config: Any) -> PreTrainedModel:
    """The tower of a configuration of transformers.

    Raises:
        ValueError: a model that is none of these.
    """
    num_tokens(config, 1)  # refuses others
    tower: PreTrainedModel = _tower_class(config.model_type)(config)
    return tower


@cache
def _tower_class(model_type: str) -> Any:
    whole: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    model = whole
    if model_type == WHISPER:
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        model = WhisperEncoder
    return type(f"{model.__name__}Tower", (_Tower, model), {"__module__": __name__, "whole": whole})


class _Tower:
    """A model of transformers with the arguments and outputs of `OmniAudioModel`."""

    config: Any
    whole: Any
    """The model as transformers has it; it knows under which names its tensors may be saved."""
    main_input_name = "input_features"

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers; if the model has a decoder, its encoder alone."""
        model, report = cls.whole.from_pretrained(*args, output_loading_info=True, **kwargs)
        if not issubclass(cls, cls.whole):
            inside = "encoder."
            model = model.encoder
            report |= {
                name: {key.removeprefix(inside) for key in report[name] if key.startswith(inside)}
                for name in ("missing_keys", "unexpected_keys")
            }
            report["mismatched_keys"] = [each for each in report["mismatched_keys"] if each[0].startswith(inside)]
        model.__class__ = cls
        return (model, report) if output_loading_info else model

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> OmniAudioOutput:
        """Encode sounds as the model's feature extractor makes them."""
        inputs: dict[str, Any] = {
            "input_features" if self.config.model_type == WHISPER else "input_values": input_features
        }
        if hears_samples(self.config) and self.config.feat_extract_norm == "layer":
            inputs["attention_mask"] = attention_mask
        encoded = super().forward(**inputs, **kwargs)  # type: ignore[misc]
        tokens = encoded.last_hidden_state
        if self.config.model_type == SPECTROGRAM:  # CLS, the token of distillation, patches
            cls, grid = tokens[:, :1], tokens[:, 2:]
        else:
            frames = input_features.shape[-1]
            lengths = torch.full((len(tokens),), frames) if attention_mask is None else attention_mask.sum(1)
            lengths = num_tokens(self.config, lengths.to(tokens.device))[:, None]
            real = torch.arange(tokens.shape[1], device=tokens.device) < lengths
            grid = tokens.masked_fill(~real[:, :, None], 0)
            cls = grid.sum(1, keepdim=True) / lengths[:, :, None]
        return OmniAudioOutput(
            last_hidden_state=tokens,
            pooler_output=cls[:, 0],
            hidden_states=encoded.get("hidden_states"),
            attentions=encoded.get("attentions"),
            cls=cls,
            grid=grid,
        )
