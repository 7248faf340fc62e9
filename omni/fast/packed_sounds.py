"""The encoder of sounds, packed for inference on CPUs: its weights are prepared once, and no sound is padded.

Sounds of a batch differ in length. Padded, they would take the time of the longest each; and every convolution and every
attention would need a mask. Here each sound is encoded at its own length. The blocks are those of `packed_blocks.py`, or
compiled (`compiled_encoder.py`). Compiled, a tile of tokens goes from its features through all convolutions at once, so
what these make of a long sound is never in memory as a whole.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from omni.audio.feature_extraction_audio import OmniFeatureExtractor
from omni.audio.modeling_audio import OmniAudioModel, OmniAudioOutput, sinusoids
from omni.audio.sound import Sound
from omni.audio.sounds import read_sound, sound_at
from omni.blocks import Block

from .compiled_encoder import CompiledSounds, is_possible
from .packed_blocks import PackedBlock, is_plain, weights_of
from .products import keep_memory

MOST_HALVINGS = 8
"""Of a stem that is compiled. A tile of tokens has 2^8 times as many frames."""
ROWS = 64
"""Tokens of a usual sound, for the layout of oneDNN's weights."""


def pack(model: Any, extractor: Any, dtype: torch.dtype) -> "PackedAudioModel | None":
    """The packed form of an encoder and its feature extractor; None if there is none.

    The encoder must be an `OmniAudioModel` on a CPU, just as its configuration describes it (without adapters, hooks,
    quantised or cut weights), with the stem "conv1d", LayerNorm and a CLS token. The extractor must be an
    `OmniFeatureExtractor` with as many mel bands.
    """
    if type(model) is not OmniAudioModel or type(extractor) is not OmniFeatureExtractor or not is_plain(model):
        return None
    config = model.config
    usual = config.stem == "conv1d" and config.block_norm == "layer_norm" and config.cls_token
    if not usual or extractor.num_mel_bins != config.num_mel_bins:
        return None
    return PackedAudioModel(model, extractor, dtype)


class PackedAudioModel:
    """An `OmniAudioModel` in eval mode, prepared for many calls. It copies the weights: later changes do not count.

    Args:
        model: the encoder, on a CPU; see `pack`.
        extractor: the feature extractor.
        dtype: type of weights and activations, float32 or bfloat16.

    Attributes:
        path: "compiled" for a function of machine code, else "packed".
    """

    def __init__(
        self, model: OmniAudioModel, extractor: OmniFeatureExtractor, dtype: torch.dtype = torch.float32
    ) -> None:
        keep_memory()
        self.config, self.dtype, self._extractor = model.config, dtype, extractor
        self._cls = model.embeddings.cls_token.detach().float()[0].clone()  # [1, D]
        self._start = self._cls
        layers: list[Block] = [*model.layers]
        stem: Any = model.embeddings.stem
        convolutions = [(kernel.weight.detach(), kernel.bias.detach()) for kernel in stem.convolutions]
        self._compiled = None
        possible = is_possible(self.config, dtype) and self.config.num_halvings <= MOST_HALVINGS
        self.path = "compiled" if possible else "packed"
        if possible:
            matrices = [(weight.transpose(1, 2).flatten(1), bias) for weight, bias in convolutions]
            self._compiled = CompiledSounds(self.config, dtype, matrices, *weights_of(model.norm, layers))
            return
        self._stem = [(weight.to(dtype, copy=True), bias.to(dtype, copy=True)) for weight, bias in convolutions]
        self._blocks = [PackedBlock(layer, dtype, ROWS) for layer in layers]
        self._norm = model.norm.weight.detach().to(torch.float32, copy=True)

    def read(self, source: Any, at_least: int | None = None) -> tuple[Sound, None, str | None]:
        """A sound and a note about anything odd in its file; sounds have no width and height, and are read whole.

        Raises:
            SoundError: see `read_sound`.
        """
        sound = read_sound(source)
        return sound, None, "; ".join(sound.notes) or None

    def prepare(self, item: Any) -> NDArray[np.float32]:
        """One sound, in any form -> its features float32[F, M].

        Raises:
            SoundError: see `sound_at`.
        """
        return self._extractor.features(sound_at(self._extractor.sampling_rate, item).samples)

    def batch(self, prepared: Sequence[NDArray[np.float32]]) -> list[torch.Tensor]:
        """The features of each sound."""
        return [torch.from_numpy(each) for each in prepared]

    def grid_shapes(self, sounds: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
        """Tokens of each sound."""
        return [(-(-len(sound) // self.config.time_reduction),) for sound in sounds]

    @torch.inference_mode()
    def __call__(self, sounds: Sequence[torch.Tensor], cls_only: bool = False) -> OmniAudioOutput:
        """Encode sounds of any lengths.

        Args:
            sounds: float32[F, M] of each.
            cls_only: compute the CLS token alone; `grid` is None.

        Raises:
            ValueError: a sound without frames, or features of another shape, type or device.
        """
        bands = self.config.num_mel_bins
        for sound in sounds:
            dense = sound.is_cpu and sound.layout is torch.strided and sound.is_floating_point()
            if not dense or sound.ndim != 2 or not len(sound) or sound.shape[1] != bands:
                raise ValueError(
                    f"Expected features float[F, {bands}] of each sound on the CPU, with one frame at least, found "
                    f"{sound.dtype} of shape {tuple(sound.shape)} on {sound.device}, {sound.layout}."
                )
        counts = [1 + count for (count,) in self.grid_shapes(sounds)]
        start = self._positions(max(counts, default=1))
        given = [sound.resolve_neg().to(torch.float32).contiguous() for sound in sounds]
        encode = self._compiled or self._encode
        encoded = encode(given, start, cls_only).to(self.dtype)
        return OmniAudioOutput(
            last_hidden_state=encoded,
            pooler_output=encoded[:, 0],
            cls=encoded[:, :1],
            grid=None if cls_only else encoded[:, 1:],
        )

    def _positions(self, tokens: int) -> torch.Tensor:
        """float32[n, D] for so many tokens or more: CLS, and the positions of the others.

        There are twice as many as were asked for last, so that not every longer sound computes them again.
        """
        start = self._start
        if len(start) < tokens:
            width = self.config.hidden_size
            if self.config.position_embedding == "sinusoidal":
                table = sinusoids(2 * tokens, width, self._cls.device)
            else:
                table = torch.zeros(2 * tokens, width, dtype=torch.float32, device="cpu")
            start = self._start = torch.cat([self._cls, table]).contiguous()
        return start

    def _encode(self, sounds: Sequence[torch.Tensor], start: torch.Tensor, cls_only: bool) -> torch.Tensor:
        """As `CompiledSounds`, by oneDNN."""
        found = []
        for sound in sounds:
            hidden = sound.to(self.dtype).T[None]
            for step, (weight, bias) in enumerate(self._stem):
                hidden = F.gelu(F.conv1d(hidden, weight, bias, stride=1 if step == 0 else 2, padding=1))
            tokens = hidden[0].T.float() + start[1 : 1 + hidden.shape[2]]
            hidden = torch.cat([start[:1], tokens])[None].to(self.dtype)
            for block in self._blocks[:-1]:
                hidden = block(hidden)
            hidden = self._blocks[-1].cls(hidden) if cls_only else self._blocks[-1](hidden)
            found.append(F.rms_norm(hidden[0].float(), self._norm.shape, self._norm, self.config.rms_norm_eps))
        if not found:
            return torch.empty(0, 1, self.config.hidden_size, dtype=torch.float32, device="cpu")
        return nn.utils.rnn.pad_sequence(found, batch_first=True)
