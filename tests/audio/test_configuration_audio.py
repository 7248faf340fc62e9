"""Both names of every number, nothing unknown, nothing that contradicts itself."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from omni.audio.configuration_audio import OmniAudioConfig

ALIASES = {
    "mel_bins": "num_mel_bins",
    "downsample_time": "time_reduction",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "dropout": "hidden_dropout_prob",
}
OTHER = {"mel_bins": 40, "downsample_time": 4, "d_model": 96, "n_layers": 6, "n_heads": 4, "d_ff": 200, "dropout": 0.25}


def test_the_file_of_defaults() -> None:
    assert OmniAudioConfig.from_json_file("configs/audio_tiny.json") == OmniAudioConfig()


def test_both_names() -> None:
    long = {ALIASES[alias]: value for alias, value in OTHER.items()}
    assert OmniAudioConfig(**OTHER) == OmniAudioConfig(**long)
    assert all(getattr(OmniAudioConfig(**OTHER), name) == value for name, value in (OTHER | long).items())
    with pytest.raises(ValueError, match="`mel_bins` is another name of `num_mel_bins`"):
        OmniAudioConfig(mel_bins=40, num_mel_bins=80)


def test_saved_and_found_again(tmp_path) -> None:
    OmniAudioConfig(**OTHER, stem="conv2d", block_norm="rms_norm").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_mel_bins"] == 40
    found = AutoConfig.from_pretrained(tmp_path)
    assert type(found) is OmniAudioConfig
    assert {**found.to_dict(), "_name_or_path": ""} == {
        **OmniAudioConfig(**OTHER, stem="conv2d", block_norm="rms_norm").to_dict(),
        "_name_or_path": "",
        "transformers_version": found.transformers_version,
    }


def test_what_follows_from_other_numbers() -> None:
    assert [OmniAudioConfig(time_reduction=r).num_halvings for r in (2, 4, 8, 16)] == [1, 2, 3, 4]
    assert OmniAudioConfig().head_dim == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mel_bin": 40}, "Unknown key 'mel_bin' for OmniAudioConfig; known: .*'mel_bins'"),
        ({"time_reduction": 6}, "`time_reduction` must be 2, 4, 8 or another power of 2, found 6"),
        ({"time_reduction": 1}, "found 1"),
        ({"time_reduction": -8}, "found -8"),
        ({"stem": "conv3d"}, "`stem` must be one of conv1d, conv2d, found 'conv3d'"),
        ({"block_norm": "batch_norm"}, "`block_norm` must be one of layer_norm, rms_norm"),
        ({"position_embedding": "learned"}, "`position_embedding` must be one of sinusoidal, none"),
        ({"hidden_size": 100}, "`hidden_size` must be a multiple of `num_attention_heads`, found 100 and 3"),
        ({"hidden_size": 9}, "Sinusoidal positions need an even `hidden_size` of at least 4, found 9"),
        ({"num_mel_bins": 0}, "`num_mel_bins` must be at least 1, found 0"),
        ({"num_attention_heads": 0}, "multiple of `num_attention_heads`"),
    ],
    ids=str,
)
def test_invalid_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OmniAudioConfig(**values)


@pytest.mark.parametrize("values", [{"num_mel_bins": "80"}, {"cls_token": "no"}, {"time_reduction": 8.0}], ids=str)
def test_values_of_another_type(values: dict) -> None:
    with pytest.raises(StrictDataclassError):
        OmniAudioConfig(**values)


def test_odd_widths_without_positions() -> None:
    assert OmniAudioConfig(hidden_size=9, position_embedding="none").head_dim == 3
