"""The configuration: sections by modality, flat names into them, and no key that nobody reads."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, Qwen3Config

from omni import OmniConfig, OmniModel, OmniVisionConfig

Make = Callable[..., OmniConfig]


def test_by_default_pictures_before_a_small_thinker() -> None:
    config = OmniConfig()
    assert sorted(config.modalities) == ["image"]
    assert isinstance(config.image_config, OmniVisionConfig)
    assert isinstance(config.text_config, Qwen3Config)
    assert config.image_config.num_patches == 196
    assert config.num_tokens("image", (14, 14)) == 197
    assert config.text_config.hidden_size <= 512


# --- Flat names -------------------------------------------------------------------------------------------------------


def test_flat_names_reach_into_the_sections(make_config: Make) -> None:
    config = make_config()
    assert config.image_config is config.vision_config is config.modalities["image"]["encoder"]
    assert config.image_token_id == config.modalities["image"]["token_id"] == 3
    config.image_token_id = 7
    assert config.modalities["image"]["token_id"] == 7
    config.image_config = {"image_size": 32}
    assert (config.image_config.image_size, config.image_config.hidden_size) == (32, 24)
    config.vision_config = CLIPVisionConfig(hidden_size=48)
    assert config.modalities["image"]["encoder"].hidden_size == 48
    assert not hasattr(config, "depth_config")
    assert not hasattr(config, "audio_token_id")


def test_flat_names_as_arguments() -> None:
    config = OmniConfig(image_config={"image_size": 32}, image_token_id=5)
    assert (config.image_config.image_size, config.image_token_id) == (32, 5)
    assert OmniConfig(vision_config={"image_size": 32}).image_config.image_size == 32
    other = OmniConfig(vision_config={"model_type": "clip_vision_model", "hidden_size": 48})
    assert isinstance(other.image_config, CLIPVisionConfig)
    assert OmniConfig(image_config=None).modalities == {}


def test_sub_configs_are_those_of_the_instance(make_config: Make) -> None:
    """transformers hands dtype and attention implementation to what stands there."""
    config = make_config(tower="clip_vision_model")
    assert OmniConfig.sub_configs.keys() == {"text_config"}
    assert config.sub_configs == {"text_config": AutoConfig, "image_config": CLIPVisionConfig}
    config._attn_implementation = "eager"
    assert config.image_config._attn_implementation == config.text_config._attn_implementation == "eager"
    assert OmniModel._from_config(config, dtype=torch.bfloat16).image_tower.dtype == torch.bfloat16


def test_tying_is_the_thinkers_own_setting(make_config: Make) -> None:
    config = make_config(text={"tie_word_embeddings": True})
    assert config.tie_word_embeddings
    config.tie_word_embeddings = False
    assert not config.text_config.tie_word_embeddings
    assert OmniConfig(tie_word_embeddings=True).text_config.tie_word_embeddings


# --- On disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["omni_vision", "clip_vision_model", "siglip_vision_model", "dinov2", "vit"])
@pytest.mark.parametrize("thinker", ["qwen3", "gpt2", "gemma"])
def test_comes_back_from_disk(make_config: Make, tmp_path: Path, tower: str, thinker: str) -> None:
    config = make_config(thinker, tower, projector="unshuffle_mlp", factor=2, output="grid")
    config.untrained = ["image_projector"]
    config.save_pretrained(tmp_path)
    for again in (OmniConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert again.to_json_string() == config.to_json_string()
        assert type(again.image_config) is type(config.image_config)
        assert again.untrained == ["image_projector"]
    for made in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), OmniConfig(**config.to_dict())):
        assert made.to_dict() == config.to_dict()


def test_encoders_stand_where_transformers_looks(make_config: Make, tmp_path: Path) -> None:
    make_config(tower="clip_vision_model").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["image_config"]["model_type"] == "clip_vision_model"
    assert sorted(written["modalities"]["image"]) == ["factor", "output", "projector", "token_id"]
    assert CLIPVisionConfig.from_pretrained(tmp_path).hidden_size == 24
    assert Qwen3Config.from_pretrained(tmp_path).hidden_size == 32


def test_what_is_no_setting_is_not_written(make_config: Make, tmp_path: Path) -> None:
    """Tools hang notes on configurations; a file with them could not be read again."""
    config = make_config()
    config.note_of_some_tool = 1
    config.save_pretrained(tmp_path)
    assert OmniConfig.from_pretrained(tmp_path).to_dict() == make_config().to_dict()


def test_a_copy_shares_nothing(make_config: Make) -> None:
    config = make_config()
    twin = copy.deepcopy(config)
    twin.image_config.image_size = 64
    twin.modalities["image"]["output"] = "cls"
    assert (config.image_config.image_size, config.modalities["image"]["output"]) == (16, "cls+grid")
    config.to_dict()["modalities"]["image"]["output"] = "cls"
    assert config.modalities["image"]["output"] == "cls+grid"


# --- Overrides at loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(make_config: Make, tmp_path: Path) -> Path:
    make_config(projector="unshuffle_mlp", factor=2).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "override",
    [
        {"image_config": {"image_size": 32}},
        {"vision_config": {"image_size": 32}},
        {"modalities": {"image": {"encoder": {"image_size": 32}}}},
    ],
)
def test_an_override_changes_just_that(folder: Path, override: dict[str, Any]) -> None:
    config, unused = OmniConfig.from_pretrained(folder, **override, return_unused_kwargs=True)
    assert unused == {}
    assert (config.image_config.image_size, config.image_config.hidden_size) == (32, 24)
    assert config.modalities["image"]["projector"] == "unshuffle_mlp"
    assert config.num_tokens("image", (4, 4)) == 5


def test_overrides_by_key(folder: Path) -> None:
    config = OmniConfig.from_pretrained(
        folder, modalities={"image": {"output": "cls"}}, image_token_id=9, text_config={"vocab_size": 20}
    )
    section = config.modalities["image"]
    assert (section["output"], section["projector"], section["token_id"]) == ("cls", "unshuffle_mlp", 9)
    assert (config.text_config.vocab_size, config.text_config.hidden_size) == (20, 32)


def test_another_encoder_or_thinker(folder: Path) -> None:
    config = OmniConfig.from_pretrained(
        folder,
        image_config={"model_type": "clip_vision_model", "hidden_size": 48},
        text_config={"model_type": "llama", "vocab_size": 20},
    )
    assert isinstance(config.image_config, CLIPVisionConfig)
    assert config.image_config.image_size == CLIPVisionConfig().image_size
    assert isinstance(config.text_config, LlamaConfig)


@pytest.mark.parametrize("override", [{"image_config": None}, {"modalities": {"image": None}}])
def test_none_leaves_a_modality_out(folder: Path, override: dict[str, Any]) -> None:
    config = OmniConfig.from_pretrained(folder, **override)
    assert config.modalities == {}
    assert not hasattr(config, "image_config")
    model = OmniModel(config)
    assert [name for name, _ in model.named_children()] == ["language_model"]
    assert model(input_ids=torch.tensor([[7, 3, 9]])).last_hidden_state.shape == (1, 3, 32)


# --- What nobody reads is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["text_cfg", "image_sise", "depth_config", "audio_token_id", "vision_tower"])
def test_an_unknown_key_lists_the_known(key: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"Unknown key '{key}' for OmniConfig; known: .*'image_config'"):
        OmniConfig(**{key: {}})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, key: {}}))
    with pytest.raises(ValueError, match=rf"Unknown key '{key}'"):
        OmniConfig.from_pretrained(folder)


def test_vision_config_needs_pictures() -> None:
    with pytest.raises(ValueError, match="Unknown key 'vision_config'"):
        OmniConfig(modalities={}, vision_config={})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"token_idx": 3}, r"Unknown key 'token_idx' for modality 'image'; known: \('encoder', 'token_id'"),
        ({"token_id": None}, "'image' needs `token_id`, the id of its placeholder '<image>'"),
        ({"token_id": "3"}, "found '3'"),
        ({"output": "grids"}, r"Unknown output 'grids' for 'image'; known: \('cls', 'grid', 'cls\+grid'\)"),
        ({"projector": "mpl"}, r"Unknown projector 'mpl' for 'image'; known: \['linear', 'mlp', 'unshuffle_mlp'\]"),
        ({"projector": "mlp", "factor": 2}, "`factor` of modality 'image'.* found 2 with 'mlp'"),
        ({"projector": "unshuffle_mlp", "factor": 0}, "found 0 with 'unshuffle_mlp'"),
        ({"projector": "unshuffle_mlp", "factor": 1.5}, "found 1.5"),
        ({"positions": [7]}, r"should be 2 whole numbers from 1 on, such as \[7, 7\]; found \[7\]"),
        ({"positions": [7, 0]}, r"found \[7, 0\]"),
        ({"positions": [7, 7], "output": "cls"}, "found 2 axes and the output 'cls'"),
        ({"whitened": 1}, "`whitened` of modality 'image' is true or false, found 1"),
        ({"encoder": {"model_type": "no_such"}}, "Unknown model_type 'no_such' in modality 'image'"),
        ({"encoder": {"model_type": "clip"}}, "a CLIPConfig, has no `hidden_size`; .* such as clip_vision_model"),
        ({"encoder": {"patchsize": 4}}, "Unknown key 'patchsize'"),
    ],
)
def test_an_invalid_section_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OmniConfig(modalities={"image": {"token_id": 3, **section}})


def test_an_unknown_modality_or_language_model() -> None:
    with pytest.raises(ValueError, match=r"Unknown modality 'images'; known: \['audio', 'image'\]"):
        OmniConfig(modalities={"images": {"token_id": 3}})
    with pytest.raises(ValueError, match="Unknown model_type 'gpt9' in text_config"):
        OmniConfig(text_config={"model_type": "gpt9"})
    with pytest.raises(ValueError, match="A BartConfig describes an encoder-decoder"):
        OmniConfig(text_config={"model_type": "bart"})
