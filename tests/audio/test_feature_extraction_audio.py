"""The feature extractor against the spectrogram of transformers, and every rate that a sound may come with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from omni.audio.feature_extraction_audio import OmniFeatureExtractor
from omni.audio.sound import Sound
from omni.audio.sounds import read_sound
from omni.checkpoints.folder import CheckpointError

from .conftest import chirp, file_of

MICRO: dict[str, Any] = {
    "n_fft": 1024, "num_mel_bins": 128, "mel_scale": "htk", "log_mel": False, "do_normalize": False
}  # fmt: skip
"""What micro-Omni's encoder hears."""


def features(sound: Any, **options: Any) -> np.ndarray:
    return OmniFeatureExtractor(**options)(sound, return_tensors="np")["input_features"]


# --- Arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        MICRO,
        {"win_length": 512, "hop_length": 100},
        {"mel_scale": "htk", "num_mel_bins": 40, "sampling_rate": 8_000},
    ],
    ids=str,
)
@pytest.mark.parametrize("samples", [3_000, 3_040, 600])
def test_the_spectrogram_is_that_of_transformers(options: dict[str, Any], samples: int) -> None:
    extractor = OmniFeatureExtractor(**options)
    sound = chirp()[:samples]
    n_fft, rate = extractor.n_fft, extractor.sampling_rate
    window = np.zeros(n_fft)  # a shorter window stands in the middle of the transform
    start = (n_fft - extractor.win_length) // 2
    window[start : start + extractor.win_length] = window_function(extractor.win_length, "hann")
    slaney = extractor.mel_scale == "slaney"
    filters = mel_filter_bank(
        n_fft // 2 + 1, extractor.num_mel_bins, 0, rate / 2, rate, "slaney" if slaney else None, extractor.mel_scale
    )
    log = "log10" if extractor.log_mel else None
    expected = spectrogram(
        sound, window, n_fft, extractor.hop_length, power=2.0, mel_filters=filters, log_mel=log, mel_floor=1e-10
    ).T
    if extractor.do_normalize:
        expected = (expected + 4) / 2
    found = features(sound, **options)
    assert found.shape == (1, 1 + samples // extractor.hop_length, extractor.num_mel_bins)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 19])
def test_a_long_sound_in_blocks_is_the_same(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = features(chirp()[:3_040])  # 20 frames
    monkeypatch.setattr("omni.audio.feature_extraction_audio.BLOCK", block)
    np.testing.assert_allclose(features(chirp()[:3_040]), expected, rtol=1e-5, atol=1e-5)


def test_silence_is_finite_and_loudness_is_kept() -> None:
    assert (features(np.zeros(1_600)) == -3).all()  # log10 of the floor, -10
    louder, softer = features(chirp()), features(chirp() / 10)
    np.testing.assert_allclose(louder - softer, 1, atol=0.01)  # 20 dB


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 161, 255, 256, 257])
def test_sounds_shorter_than_a_window(samples: int) -> None:
    found = features(chirp()[:samples])
    assert found.shape == (1, 1 + samples // 160, 80)
    assert np.isfinite(found).all()


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_its_sounds_and_says_where_they_end() -> None:
    extractor = OmniFeatureExtractor()
    lengths = [4_000, 159, 1_600]
    batch = extractor([chirp()[:length] for length in lengths], return_tensors="pt")
    frames = [1 + length // 160 for length in lengths]
    assert list(batch) == ["input_features", "attention_mask"]
    assert batch["input_features"].shape == (3, 26, 80)
    assert batch["attention_mask"].sum(1).tolist() == frames
    for row, length, frame in zip(batch["input_features"], lengths, frames, strict=True):
        assert torch.equal(row[:frame], torch.from_numpy(features(chirp()[:length])[0]))
        assert not row[frame:].any()
    alone = extractor(chirp(), return_tensors="pt")
    assert alone["attention_mask"].all()


def test_padding_that_is_asked_for() -> None:
    extractor, sounds = OmniFeatureExtractor(), [chirp()[:4_000], chirp()[:1_600]]
    assert extractor(sounds, pad_to_multiple_of=8, return_tensors="np")["input_features"].shape == (2, 32, 80)
    fixed = extractor(sounds, padding="max_length", max_length=50, return_tensors="np")
    assert fixed["input_features"].shape == (2, 50, 80)
    assert fixed["attention_mask"].sum(1).tolist() == [26, 11]
    assert [len(each) for each in extractor(sounds, padding=False)["input_features"]] == [26, 11]


# --- Rates ------------------------------------------------------------------------------------------------------------


def forms(samples: np.ndarray, rate: int) -> list[Any]:
    sound = Sound(samples, rate)
    return [sound, (samples, rate), {"array": samples, "sampling_rate": rate}, file_of(samples, rate, subtype="FLOAT")]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_a_known_rate_becomes_the_extractors(rate: int) -> None:
    samples = chirp(rate=rate)
    expected = features(Sound(samples, rate).resampled(16_000))
    for form in [*forms(samples, rate), *([f] for f in forms(samples, rate))]:
        np.testing.assert_array_equal(features(form), expected)
        found = OmniFeatureExtractor()(form, sampling_rate=rate, return_tensors="np")["input_features"]
        np.testing.assert_array_equal(found, expected)
    for bare in (samples, samples.tolist(), torch.from_numpy(samples), [samples]):
        found = OmniFeatureExtractor()(bare, sampling_rate=rate, return_tensors="np")["input_features"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", range(4))
def test_a_rate_that_contradicts_the_sounds_own_is_refused(form: int) -> None:
    for given in (forms(chirp(), 8_000)[form], [forms(chirp(), 8_000)[form]]):
        with pytest.raises(ValueError, match="comes with 8,000 samples per second, but `sampling_rate` says 16,000"):
            OmniFeatureExtractor()(given, sampling_rate=16_000)


def test_a_file_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(file_of(chirp()))
    for given in (str(path), path, [str(path)], read_sound(path)):
        np.testing.assert_array_equal(features(given), features(read_sound(path)))


def test_sounds_of_several_rates_in_one_batch() -> None:
    given = [Sound(chirp(rate=rate), rate) for rate in (8_000, 16_000, 48_000)]
    assert OmniFeatureExtractor()(given, return_tensors="pt")["attention_mask"].sum(1).tolist() == [51, 51, 51]


# --- Settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop_lenght": 80}, "OmniFeatureExtractor knows no 'hop_lenght'; its settings are .*hop_length"),
        ({"feature_size": 40}, "`feature_size` of OmniFeatureExtractor is 80 and cannot be changed"),
        ({"padding_side": "left"}, "`padding_side` .* is 'right'"),
        ({"return_attention_mask": False}, "`return_attention_mask` .* is True"),
        ({"mel_scale": "bark"}, "`mel_scale` must be one of slaney, htk, found 'bark'"),
        ({"win_length": 600}, "`win_length` must be at most `n_fft`, found 600 and 512"),
        ({"hop_length": 0}, "`hop_length` must be a whole number from 1 on, found 0"),
        ({"num_mel_bins": 1}, "`num_mel_bins` must be a whole number from 2 on"),
        ({"sampling_rate": 16_000.0}, "`sampling_rate` must be a whole number"),
        ({"std": 0.0}, "`std` must be more than 0"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        OmniFeatureExtractor(**options)


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="knows no 'truncation'"):
        OmniFeatureExtractor()(chirp(), truncation=True)
    with pytest.raises(ValueError, match="at least one sound, found none"):
        OmniFeatureExtractor()([])


@pytest.mark.parametrize("options", [{}, MICRO], ids=["default", "micro"])
def test_saved_and_found_again(options: dict[str, Any], tmp_path: Path) -> None:
    extractor = OmniFeatureExtractor(**options)
    extractor.save_pretrained(tmp_path)
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is OmniFeatureExtractor
    assert again.to_json_string() == extractor.to_json_string()
    np.testing.assert_array_equal(again(chirp())["input_features"], extractor(chirp())["input_features"])
    assert AutoFeatureExtractor.from_pretrained(tmp_path, hop_length=80).hop_length == 80
    with pytest.raises(TypeError, match="knows no 'hop_lenght'"):
        OmniFeatureExtractor.from_pretrained(tmp_path, hop_lenght=80)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hop_lenght": 80}))
    with pytest.raises(CheckpointError, match="preprocessor_config.json is damaged or changed"):
        AutoFeatureExtractor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_seal.json").unlink()
    with pytest.raises(TypeError, match="knows no 'hop_lenght'"):
        AutoFeatureExtractor.from_pretrained(tmp_path)
