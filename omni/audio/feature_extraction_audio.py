"""Sounds to tensors: resampled to the encoder's rate, then a mel spectrogram, its logarithm, and normalisation.

The spectrogram comes from `torch.stft`, which takes a quarter of the time of `transformers.audio_utils.spectrogram`. The mel
bands come from transformers, and equal those of torchaudio and librosa.
"""

import os
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BatchFeature
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from omni.audio.sounds import fetched, is_sound, read_sound, sound_at
from omni.checkpoints.preprocessor import NO_SETTINGS, SealedPreprocessorMixin

SAVED_BESIDE = frozenset({"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"})
"""Keys that transformers writes into the file of a feature extractor beside the settings."""
MEL_SCALES = {"slaney": "slaney", "htk": None}
"""For each mel scale, the norm of its filters: equal areas, as in librosa, or equal heights, as in torchaudio."""
FLOOR = 1e-10
"""Less power than this counts as silence."""
BLOCK = 2048
"""Frames that are transformed at a time: 20 s. All windows of a long sound would take 50 times its memory."""


class OmniFeatureExtractor(SealedPreprocessorMixin, SequenceFeatureExtractor):
    """Makes `input_features` float[I, F, M] and `attention_mask` int[I, F] from sounds of any length.

    F is 1 + S // hop_length for S samples. micro-Omni's encoder takes the features of `OmniFeatureExtractor(n_fft=1024,
    num_mel_bins=128, mel_scale="htk", log_mel=False, do_normalize=False)`.

    Args:
        sampling_rate: samples per second that the encoder was trained on.
        n_fft: samples of a Fourier transform.
        win_length: samples of a window, at most `n_fft`.
        hop_length: samples from one window to the next.
        num_mel_bins: mel bands M.
        mel_scale: "slaney" or "htk".
        log_mel: take the logarithm (base 10) of the power in each band.
        do_normalize: subtract `mean` and divide by `std`.
        mean, std: statistics of the features; by default about those of speech.
        padding_value: value of the features of padding, which the mask hides.

    Raises:
        TypeError: a setting is unknown.
        ValueError: a setting has a value that cannot be used.
    """

    model_input_names = ["input_features", "attention_mask"]
    found_as = {"AutoFeatureExtractor": "OmniFeatureExtractor"}

    def __init__(
        self,
        sampling_rate: int = 16_000,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        num_mel_bins: int = 80,
        mel_scale: str = "slaney",
        log_mel: bool = True,
        do_normalize: bool = True,
        mean: float = -4.0,
        std: float = 2.0,
        padding_value: float = 0.0,
        **saved: Any,
    ) -> None:
        fixed = {"feature_size": num_mel_bins, "padding_side": "right", "return_attention_mask": True}
        self.n_fft, self.win_length, self.hop_length = n_fft, win_length, hop_length
        self.num_mel_bins, self.mel_scale, self.log_mel = num_mel_bins, mel_scale, log_mel
        self.do_normalize, self.mean, self.std = do_normalize, mean, std
        settings = {*vars(self), "sampling_rate", "padding_value"}
        if unknown := sorted(saved.keys() - SAVED_BESIDE - fixed.keys()):
            raise _unknown(type(self).__name__, unknown, settings)
        for name, value in fixed.items():
            if saved.pop(name, value) != value:
                raise ValueError(f"`{name}` of {type(self).__name__} is {value!r} and cannot be changed.")
        super().__init__(num_mel_bins, sampling_rate, padding_value, **saved)
        self._check_settings()

    def _check_settings(self) -> None:
        for name in ("sampling_rate", "n_fft", "win_length", "hop_length", "num_mel_bins"):
            value, least = getattr(self, name), 2 if name in ("n_fft", "num_mel_bins") else 1
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number from {least} on, found {value!r}.")
        if self.win_length > self.n_fft:
            raise ValueError(f"`win_length` must be at most `n_fft`, found {self.win_length} and {self.n_fft}.")
        if self.mel_scale not in MEL_SCALES:
            raise ValueError(f"`mel_scale` must be one of {', '.join(MEL_SCALES)}, found {self.mel_scale!r}.")
        if not self.std > 0:
            raise ValueError(f"`std` must be more than 0, found {self.std!r}.")

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        **unknown: Any,
    ) -> BatchFeature:
        """Make `input_features` float[I, F, M] and `attention_mask` int[I, F].

        Args:
            raw_speech: one sound or several, in the forms of `omni.audio.sounds.as_sound`; an array of two axes is several.
            sampling_rate: rate of samples that come without one; by default the extractor's. A sound with another rate than
                the extractor's is resampled.
            padding: True to pad to the longest sound; "max_length" to pad to `max_length` frames; False for no padding, and
                the outputs are lists.
            max_length: see `padding`.
            pad_to_multiple_of: the padded length is a multiple of this number of frames.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: there is no sound, or `sampling_rate` contradicts the rate that a sound comes with.
            SoundError: a sound cannot be read.
            TypeError: an argument is unknown.
        """
        if unknown:
            known = {"sampling_rate", "padding", "max_length", "pad_to_multiple_of", "return_tensors"}
            raise _unknown(type(self).__name__, sorted(unknown), known)
        given = [raw_speech] if is_sound(raw_speech) else list(raw_speech)
        if not given:
            raise ValueError("Give at least one sound, found none.")
        sounds = [sound_at(self.sampling_rate, each, sampling_rate) for each in given]
        features = [self.features(sound.samples) for sound in sounds]
        made: BatchFeature = self.pad(
            BatchFeature({"input_features": features}),
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )
        return made

    def fetch_audio(self, audio_url_or_urls: Any, sampling_rate: int | None = None) -> Any:
        """Load files and addresses, as pipelines of transformers expect. Sounds are returned unchanged.

        Raises:
            SoundError: a file or address is no sound that can be read.
        """
        given = audio_url_or_urls
        if not is_sound(given):
            return [self.fetch_audio(each, sampling_rate) for each in given]
        given = fetched(given)
        return read_sound(given) if isinstance(given, str | os.PathLike) else given

    def features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32[S] at the extractor's rate -> float32[F, M].

        Window t is centred on sample t * hop_length; the ends are mirrored.
        """
        window, filters = _tables(self.n_fft, self.win_length, self.num_mel_bins, self.mel_scale, self.sampling_rate)
        padded = torch.from_numpy(np.pad(samples, self.n_fft // 2, mode="reflect"))
        frames = 1 + (len(padded) - self.n_fft) // self.hop_length
        mel = torch.empty(frames, self.num_mel_bins, dtype=torch.float32, device="cpu")
        for start in range(0, frames, BLOCK):
            stop = min(start + BLOCK, frames)
            part = padded[start * self.hop_length : (stop - 1) * self.hop_length + self.n_fft]
            transformed = torch.stft(
                part, self.n_fft, self.hop_length, self.win_length, window, center=False, return_complex=True
            )
            # one frame after the other in memory; a sum over pairs of neighbours would take four times as long
            power = transformed.T.real.square().addcmul_(transformed.T.imag, transformed.T.imag)
            torch.mm(power, filters, out=mel[start:stop])
        if self.log_mel:
            mel.clamp_(min=FLOOR).log10_()
        if self.do_normalize:
            mel.sub_(self.mean).div_(self.std)
        features: NDArray[np.float32] = mel.numpy()
        return features

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but an unknown setting is refused unless `return_unused_kwargs` asks for it."""
        strange = kwargs.keys() - feature_extractor_dict.keys() - NO_SETTINGS
        if strange and not kwargs.get("return_unused_kwargs"):
            raise _unknown(cls.__name__, sorted(strange), set(feature_extractor_dict) - SAVED_BESIDE)
        return super().from_dict(feature_extractor_dict, **kwargs)


@lru_cache(maxsize=8)
def _tables(
    n_fft: int, win_length: int, num_mel_bins: int, mel_scale: str, sampling_rate: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The window float32[win_length], and the mel bands float32[n_fft // 2 + 1, M]."""
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=sampling_rate / 2,
        sampling_rate=sampling_rate,
        norm=MEL_SCALES[mel_scale],
        mel_scale=mel_scale,
    )
    window = torch.hann_window(win_length, dtype=torch.float32, device="cpu")
    return window, torch.from_numpy(filters.astype(np.float32))


def _unknown(name: str, unknown: list[str], known: set[str]) -> TypeError:
    return TypeError(f"{name} knows no {', '.join(map(repr, unknown))}; its settings are {', '.join(sorted(known))}.")
