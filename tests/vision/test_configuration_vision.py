"""Both names of every number, nothing unknown, nothing that contradicts itself."""

import copy
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassError

from omni.vision.configuration_vision import OmniVisionConfig

ALIASES = {
    "img_size": "image_size",
    "patch": "patch_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "dropout": "hidden_dropout_prob",
}
OTHER = {"img_size": 96, "patch": 8, "d_model": 96, "n_layers": 6, "n_heads": 4, "d_ff": 200, "dropout": 0.25}
OTHER_LONG = {ALIASES[alias]: value for alias, value in OTHER.items()}


def numbers(config: OmniVisionConfig) -> dict:
    return {name: getattr(config, name) for name in ALIASES.values()}


class TestNames:
    def test_the_seeds_file(self) -> None:
        path = "configs/vision_tiny.json"
        with open(path) as file:
            assert json.load(file) == {
                "img_size": 224, "patch": 16, "d_model": 128, "n_layers": 4, "n_heads": 2, "d_ff": 512
            }  # fmt: skip
        assert OmniVisionConfig.from_json_file(path) == OmniVisionConfig()
        assert numbers(OmniVisionConfig()) == {
            "image_size": 224, "patch_size": 16, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 512, "hidden_dropout_prob": 0.1,
        }  # fmt: skip

    def test_keyword_arguments(self) -> None:
        assert numbers(OmniVisionConfig(**OTHER)) == OTHER_LONG
        assert OmniVisionConfig(**OTHER) == OmniVisionConfig(**OTHER_LONG)
        assert OmniVisionConfig(img_size=96, patch_size=8) == OmniVisionConfig(image_size=96, patch=8)

    def test_json(self, tmp_path) -> None:
        (tmp_path / "seed.json").write_text(json.dumps(OTHER))
        assert OmniVisionConfig.from_json_file(tmp_path / "seed.json") == OmniVisionConfig(**OTHER_LONG)
        (tmp_path / "config.json").write_text(json.dumps({**OTHER, "model_type": "omni_vision"}))
        assert numbers(OmniVisionConfig.from_pretrained(tmp_path)) == OTHER_LONG
        assert OmniVisionConfig.from_pretrained(tmp_path, n_layers=2).num_hidden_layers == 2

    @pytest.mark.parametrize(("alias", "name"), ALIASES.items())
    def test_attributes(self, alias, name) -> None:
        config = OmniVisionConfig(**OTHER)
        assert getattr(config, alias) == getattr(config, name) == OTHER[alias]
        setattr(config, alias, 0.5 if alias == "dropout" else 16)
        assert getattr(config, name) == (0.5 if alias == "dropout" else 16)
        assert alias not in vars(config)

    def test_written_under_one_name(self) -> None:
        written = OmniVisionConfig(**OTHER).to_dict()
        assert not set(written) & set(ALIASES)
        assert {name: written[name] for name in OTHER_LONG} == OTHER_LONG
        assert not {"grid_size", "num_patches", "head_dim"} & set(written)

    @pytest.mark.parametrize("alias", ALIASES)
    def test_contradiction(self, alias) -> None:
        name, default = ALIASES[alias], getattr(OmniVisionConfig(), ALIASES[alias])
        for value, other in ((OTHER[alias], 2 * OTHER[alias]), (OTHER[alias], default), (default, OTHER[alias])):
            with pytest.raises(ValueError, match=f"`{alias}` is another name of `{name}`.*{value} and {other}"):
                OmniVisionConfig(**{alias: value, name: other})
        assert getattr(OmniVisionConfig(**{alias: default, name: default}), alias) == default


class TestMistakes:
    @pytest.mark.parametrize("key", ["patchsize", "imagesize", "attention_dropout", "vocab_size", "embed_dim"])
    def test_unknown_key(self, key) -> None:
        with pytest.raises(ValueError, match=f"Unknown key '{key}'") as error:
            OmniVisionConfig(**{key: 4})
        known = str(error.value).split("known:")[1]
        assert all(repr(name) in known for pair in ALIASES.items() for name in pair)
        with pytest.raises(ValueError, match=f"Unknown key '{key}'"):
            OmniVisionConfig.from_dict({key: 4})

    def test_all_unknown_keys_at_once(self) -> None:
        with pytest.raises(ValueError, match="Unknown key 'a', 'b' for"):
            OmniVisionConfig(b=1, a=2, img_size=32)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"img_size": 225}, "`image_size` must be a multiple of `patch_size`, found 225 and 16"),
            ({"image_size": 8}, "found 8 and 16"),
            (
                {"d_model": 128, "n_heads": 3},
                "`hidden_size` must be a multiple of `num_attention_heads`, found 128 and 3",
            ),
            ({"n_heads": 0}, "found 128 and 0"),
            ({"n_heads": -2}, "found 128 and -2"),
            *(
                ({name: value}, f"`{ALIASES.get(name, name)}` must be at least 1, found {value}")
                for name in ("img_size", "patch", "num_channels", "d_model", "n_layers", "d_ff")
                for value in (0, -1)
            ),
        ],
        ids=str,
    )
    def test_sizes(self, sizes, message) -> None:
        with pytest.raises(ValueError, match=message):
            OmniVisionConfig(**sizes)

    @pytest.mark.parametrize("value", ["224", 224.0, True, None])
    def test_types(self, value) -> None:
        for name in ("image_size", "img_size"):
            with pytest.raises(StrictDataclassError, match="image_size"):
                OmniVisionConfig(**{name: value})

    def test_no_invalid_file_is_written(self, tmp_path) -> None:
        config = OmniVisionConfig()
        config.img_size = 225
        with pytest.raises(StrictDataclassError, match="225 and 16"):
            config.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


class TestDerived:
    @pytest.mark.parametrize(
        ("sizes", "grid_size", "num_patches", "head_dim"),
        [({}, 14, 196, 64), (OTHER, 12, 144, 24), ({"img_size": 16, "d_model": 6, "n_heads": 3}, 1, 1, 2)],
        ids=["tiny", "other", "one patch"],
    )
    def test_properties(self, sizes, grid_size, num_patches, head_dim) -> None:
        config = OmniVisionConfig(**sizes)
        assert (config.grid_size, config.num_patches, config.head_dim) == (grid_size, num_patches, head_dim)

    def test_follow_their_source(self) -> None:
        config = OmniVisionConfig()
        config.img_size = 32
        assert (config.grid_size, config.num_patches) == (2, 4)

    @pytest.mark.parametrize("name", ["grid_size", "num_patches", "head_dim"])
    def test_cannot_be_given(self, name) -> None:
        with pytest.raises(ValueError, match=f"Unknown key '{name}'"):
            OmniVisionConfig(**{name: 1})


class TestSaving:
    @pytest.mark.parametrize(
        "options", [{}, OTHER, {"num_labels": 3, "dtype": "bfloat16"}], ids=["tiny", "other", "hf"]
    )
    def test_round_trip(self, options, tmp_path) -> None:
        config = OmniVisionConfig(**options)
        config.save_pretrained(tmp_path)
        assert OmniVisionConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
        assert OmniVisionConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
        assert OmniVisionConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()

    def test_copies(self) -> None:
        config = OmniVisionConfig(**OTHER)
        assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
        assert config != OmniVisionConfig()

    def test_what_trainer_leaves_behind(self, tmp_path) -> None:
        config = OmniVisionConfig(**OTHER)
        config.use_cache = False
        config.save_pretrained(tmp_path)
        assert numbers(OmniVisionConfig.from_pretrained(tmp_path)) == OTHER_LONG
