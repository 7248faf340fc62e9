"""The audio encoder: it turns the frames of a sound into one summary token (`cls`) and tokens in time (`grid`).

Shapes: I sounds, F frames of M mel bands, r frames per token, N = ceil(F / r) tokens, D width, h heads.

    input_features (I, F, M), attention_mask (I, F)
      -> stem: convolutions that shorten time r times      (I, N, D)
      -> plus sinusoidal positions, CLS in front           (I, 1+N, D)
      -> blocks: x + attention(norm(x)), x + mlp(norm(x))  (I, 1+N, D)
      -> RMSNorm                                           (I, 1+N, D)
      -> cls (I, 1, D), grid (I, N, D)

Padding is set to zero before every convolution and masked in attention, so a sound has the same tokens alone and in a batch.
The stem "conv1d" and the positions are those of Whisper (Radford et al., "Robust Speech Recognition via Large-Scale Weak
Supervision", 2022), with as many halvings as r needs. The stem "conv2d" is that of micro-Omni.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, torch_compilable_check
from transformers.utils.output_capturing import capture_outputs

from omni.blocks import Block, SelfAttention, padding_mask
from omni.checkpoints.pretrained import StrictModel

from .configuration_audio import OmniAudioConfig

LONGEST_WAVE = 10_000
"""The wavelength of the slowest sinusoid in tokens, divided by 2 pi."""


@dataclass
class OmniAudioOutput(BaseModelOutputWithPooling):
    """The encoder's output. Tokens of padding are zero. n is 1+N with a CLS token, else N.

    Attributes:
        last_hidden_state: float[I, n, D], after the final norm.
        pooler_output: float[I, D], the summary token.
        hidden_states: float[I, n, D] before the first block and after each block; the last is `last_hidden_state`.
        attentions: float[I, h, n, n] for each block; rows sum to 1.
        cls: float[I, 1, D], the CLS token; without one, the mean of `grid` over the sound's own tokens.
        grid: float[I, N, D], tokens in order of time.
    """

    cls: torch.Tensor | None = None
    grid: torch.Tensor | None = None


class Conv1dStem(nn.Module):
    """Convolutions over time, each followed by GELU. The first has stride 1, the others have stride 2."""

    def __init__(self, config: OmniAudioConfig) -> None:
        super().__init__()
        widths = [config.num_mel_bins, *[config.hidden_size] * (1 + config.num_halvings)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, kernel_size=3, stride=1 if i == 0 else 2, padding=1)
            for i, (before, after) in enumerate(pairwise(widths))
        )

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """float[I, F, M] and bool[I, F] -> float[I, N, D]."""
        hidden = features.transpose(1, 2)
        for i, convolution in enumerate(self.convolutions):
            if mask is not None:
                hidden = hidden.masked_fill(~mask[:, None], 0)
                mask = mask if i == 0 else mask[:, ::2]
            hidden = F.gelu(convolution(hidden))
        return hidden.transpose(1, 2)


class Conv2dStem(nn.Module):
    """Convolutions of stride 2 over time and frequency, each followed by GELU, then a linear layer for each time step."""

    def __init__(self, config: OmniAudioConfig) -> None:
        super().__init__()
        widths = [1, *[config.stem_channels] * config.num_halvings]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        bands = math.ceil(config.num_mel_bins / config.time_reduction)
        self.projection = nn.Linear(config.stem_channels * bands, config.hidden_size)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """float[I, F, M] and bool[I, F] -> float[I, N, D]."""
        hidden = features[:, None]
        for convolution in self.convolutions:
            if mask is not None:
                hidden = hidden.masked_fill(~mask[:, None, :, None], 0)
                mask = mask[:, ::2]
            hidden = F.gelu(convolution(hidden))
        return self.projection(hidden.transpose(1, 2).flatten(2))


class OmniAudioEmbeddings(nn.Module):
    """Stem, positions and CLS: float[I, F, M] -> float[I, n, D]."""

    def __init__(self, config: OmniAudioConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = Conv1dStem(config) if config.stem == "conv1d" else Conv2dStem(config)
        if config.cls_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(
        self, input_features: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float[I, F, M] and bool[I, F] -> float[I, n, D] and bool[I, n]."""
        hidden = self.stem(input_features.to(next(self.stem.parameters()).dtype), mask)
        mask = None if mask is None else mask[:, :: self.config.time_reduction]
        if self.config.position_embedding == "sinusoidal":
            hidden = hidden + sinusoids(hidden.shape[1], hidden.shape[2], hidden.device).to(hidden.dtype)
        if self.config.cls_token:
            hidden = torch.cat([self.cls_token.expand(hidden.shape[0], -1, -1), hidden], dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        return hidden, mask


def sinusoids(length: int, width: int, device: torch.device) -> torch.Tensor:
    """Whisper's positions, float32[length, width]: sines, then cosines, with wavelengths in a geometric progression."""
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=device)
    speeds = torch.exp(steps * (-math.log(LONGEST_WAVE) / (half - 1)))
    angles = torch.arange(length, device=device)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class OmniAudioPreTrainedModel(StrictModel):
    """Base of `OmniAudioModel`. It tells transformers about the model, and initialises weights."""

    config: OmniAudioConfig
    config_class = OmniAudioConfig
    base_model_prefix = "audio_model"
    found_as = {
        "AutoConfig": "OmniAudioConfig",
        "AutoModel": "OmniAudioModel",
        "AutoFeatureExtractor": "OmniFeatureExtractor",
    }
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _no_split_modules = ["OmniAudioEmbeddings", "Block"]
    _can_record_outputs = {"hidden_states": Block, "attentions": SelfAttention}
    _input_embed_layer = "stem"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, OmniAudioEmbeddings) and self.config.cls_token:
            init.zeros_(module.cls_token)


class OmniAudioModel(OmniAudioPreTrainedModel):
    """The audio encoder. Its default configuration has 2,158,464 parameters."""

    def __init__(self, config: OmniAudioConfig) -> None:
        super().__init__(config)
        self.embeddings = OmniAudioEmbeddings(config)
        norm = nn.RMSNorm if config.block_norm == "rms_norm" else nn.LayerNorm
        self.layers = nn.ModuleList([Block(config, norm) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OmniAudioOutput:
        """Encode sounds.

        Args:
            input_features: float[I, F, M] as the feature extractor makes them.
            attention_mask: int[I, F], 1 for the frames of a sound, then 0 for padding; None if there is no padding.

        Raises:
            ValueError: the features have another shape or another number of bands; the mask has another shape, or is not
                ones followed by zeros.
        """
        mask = self._checked(input_features, attention_mask)
        hidden_states, mask = self.embeddings(input_features, mask)
        hidden = padding_mask(self.config, hidden_states, mask, kwargs)
        for layer in self.layers:
            hidden_states = layer(hidden_states, hidden, **kwargs)
        hidden_states = self.norm(hidden_states)
        if mask is not None:
            hidden_states = hidden_states.masked_fill(~mask[:, :, None], 0)
        if self.config.cls_token:
            cls, grid = hidden_states[:, :1], hidden_states[:, 1:]
        else:
            grid = hidden_states
            count = grid.shape[1] if mask is None else mask.sum(1)[:, None, None]
            cls = grid.sum(1, keepdim=True) / count
        return OmniAudioOutput(last_hidden_state=hidden_states, pooler_output=cls[:, 0], cls=cls, grid=grid)

    def _checked(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Check the inputs, and return the mask as bool[I, F] or None."""
        bands = self.config.num_mel_bins
        if features.ndim != 3 or features.shape[2] != bands or not features.is_floating_point():
            raise ValueError(
                f"Expected features float[I, F, {bands}] of sounds, frames and mel bands, found {features.dtype} of shape "
                f"{tuple(features.shape)}; make them with the feature extractor of this checkpoint."
            )
        if mask is None:
            return None
        if mask.shape != features.shape[:2]:
            raise ValueError(f"Expected a mask {tuple(features.shape[:2])} as the features, found {tuple(mask.shape)}.")
        mask = mask.to(features.device).bool()
        torch_compilable_check(
            mask[:, 0].all() & (mask[:, :-1] | ~mask[:, 1:]).all(),
            "Expected a mask of ones for the frames of each sound, at least one, and then zeros for padding.",
        )
        return mask
