"""Audio encoders of transformers as towers, with the arguments and the named outputs of omni's encoder.

    WhisperEncoder      input_features float[I, M, F]                    without the decoder that AutoModel would build
    ASTModel            input_values float[I, F, M]                      without a mask
    Wav2Vec2Model, ...  input_values float[I, S], attention_mask         with a mask only if it was trained with one

A tower is a subclass of the model, so its tensors have the same names.
"""

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedModel

from omni.audio.lengths import SPECTROGRAM, WHISPER, hears_samples, num_tokens
from omni.audio.modeling_audio import OmniAudioOutput


def build_tower(config: Any) -> PreTrainedModel:
    """The tower for an encoder's configuration of transformers.

    Raises:
        ValueError: the configuration is of another type of model.
    """
    num_tokens(config, 1)  # raises for other types
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
    """A model of transformers with the arguments and the outputs of `OmniAudioModel`."""

    config: Any
    whole: Any
    """The class that AutoModel builds. It loads checkpoints, whose tensors may have other names."""
    main_input_name = "input_features"

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, for the encoder alone if the model has a decoder."""
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
        """Encode sounds.

        Args:
            input_features: as the model's feature extractor makes them, see the table above.
            attention_mask: int[I, F] or int[I, S], 1 for real frames or samples, then 0; None if there is no padding.
            kwargs: other arguments of the model.
        """
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
