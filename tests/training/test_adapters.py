"""Adapters belong to the weights that they were trained for, before, between and after; merged, they are any model."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from omni import OmniForConditionalGeneration
from omni.checkpoints.folder import CheckpointError
from omni.loading.checkpoint import load
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run

from .conftest import CONFIGS, two_steps

peft = pytest.importorskip("peft")


def recipe(base: Path, output: Path, pictures: Path, **lora: Any) -> Recipe:
    shipped = json.loads((CONFIGS / "train_lora.json").read_text())["lora"]
    return two_steps("lora", base, output, pictures, lora={**shipped, **lora})


@pytest.fixture
def base(small: Path, tmp_path: Path) -> Path:
    """A model of our own to change."""
    return Path(shutil.copytree(small / "omni", tmp_path / "base"))


def change(base: Path) -> None:
    """Other weights of the same shapes, saved as they should be."""
    model = OmniForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(base)


def test_every_folder_of_adapters_knows_its_base(base: Path, pictures: Path, tmp_path: Path) -> None:
    settings = recipe(base, tmp_path / "out", pictures)
    run(settings)
    folders = [tmp_path / "out", *(tmp_path / "out" / "run").glob("checkpoint-*")]
    assert len(folders) == 3
    for folder in folders:
        load(folder)
    change(base)
    for folder in folders:
        with pytest.raises(CheckpointError, match="trained for other weights of language_model"):
            load(folder)
    shutil.rmtree(tmp_path / "out" / "run" / "checkpoint-2")
    with pytest.raises(RecipeError, match="The files of `model` in the recipe have changed since the run in"):
        run(settings, resume=True)


@pytest.mark.parametrize("saved", [[], ["image_projector"], ["image_projector", "embed_tokens"]])
def test_adapters_are_made_and_loaded_without_a_warning(
    saved: list[str], base: Path, pictures: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft|transformers")
        load(run(recipe(base, tmp_path / "out", pictures, modules_to_save=saved)))


def test_merged_adapters_of_the_embedding_alone_are_saved_as_they_are(base: Path, tmp_path: Path) -> None:
    """As guides of peft have it: the head, which was the same tensor, stays where it was."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(OmniForConditionalGeneration.from_pretrained(base), config)
    with torch.no_grad():
        adapted.get_input_embeddings().weight[5] += 0.1
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["tie_word_embeddings"] is written["text_config"]["tie_word_embeddings"] is False
    loaded = OmniForConditionalGeneration.from_pretrained(tmp_path / "merged")
    expected, found = merged.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_a_head_that_is_made_the_embedding_is_saved_so(base: Path, tmp_path: Path) -> None:
    model = OmniForConditionalGeneration.from_pretrained(base)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(tmp_path / "apart")
    apart = OmniForConditionalGeneration.from_pretrained(tmp_path / "apart")
    assert not apart.config.tie_word_embeddings
    apart.lm_head.weight = apart.get_input_embeddings().weight
    apart.save_pretrained(tmp_path / "one")
    assert "lm_head.weight" not in load_file(tmp_path / "one" / "model.safetensors")
    one = OmniForConditionalGeneration.from_pretrained(tmp_path / "one")
    assert one.lm_head.weight is one.get_input_embeddings().weight


def test_the_message_names_the_keys_of_a_tie(base: Path) -> None:
    model = OmniForConditionalGeneration.from_pretrained(base)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    model.save_pretrained(base)
    with pytest.raises(
        ValueError, match=r"set tie_word_embeddings to false in config.json, at the top and in text_config"
    ):
        OmniForConditionalGeneration.from_pretrained(base, tie_word_embeddings=True)
