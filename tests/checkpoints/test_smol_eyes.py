"""The shipped eyes for a language model: the folder is whole, small, and belongs to one language model."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from omni import OmniForConditionalGeneration, OmniProcessor
from omni.checkpoints.fingerprints import fingerprint_parts
from omni.checkpoints.folder import CheckpointError
from omni.checkpoints.seal import SEALS, verify_files
from omni.evaluation.language import language_test
from omni.loading.checkpoint import load
from omni.questions import make_prompts

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints" / "smol_eyes"
EXAMPLES = FOLDER.parents[1] / "examples"
BASE = FOLDER.parent / "SmolLM2-135M-Instruct"
MEGABYTES = 15


def test_it_holds_the_projector_alone_and_is_small() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    tensors = load_file(FOLDER / "model.safetensors")
    assert {name.split(".")[1] for name in tensors} == {"image_projector"}
    assert fingerprint_parts(tensors) == {"image_projector": config["fingerprints"]["image_projector"]}
    assert not config.get("untrained")
    assert sum(os.path.getsize(entry) for entry in os.scandir(FOLDER)) <= MEGABYTES * 10**6
    assert config["parts_from"] == {"language_model": f"../{BASE.name}", "image_tower": "../vision_tiny"}
    encoder = json.loads((FOLDER.parent / "vision_tiny" / "config.json").read_text())
    assert [*encoder["fingerprints"].values()] == [config["fingerprints"]["image_tower"]]


def test_its_files_are_as_they_were_saved() -> None:
    for seal in SEALS:
        verify_files(FOLDER, seal)
    assert OmniProcessor.from_pretrained(FOLDER).preprocessors.keys() == {"image"}


def test_it_is_refused_beside_another_language_model(tmp_path: Path) -> None:
    for name in ("smol_eyes", "vision_tiny"):
        shutil.copytree(FOLDER.parent / name, tmp_path / name)
    with pytest.raises(
        CheckpointError, match=r"has its language_model in .*SmolLM2-135M-Instruct', which is not there"
    ):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "smol_eyes")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300)).save_pretrained(tmp_path / BASE.name)
    with pytest.raises(CheckpointError):
        OmniForConditionalGeneration.from_pretrained(tmp_path / "smol_eyes")


@pytest.mark.skipif(not BASE.is_dir(), reason="sh checkpoints/smol_eyes/base.sh makes the language model")
def test_it_reads_a_scene_and_leaves_the_language_as_it_was() -> None:
    model, processor = load(FOLDER, dtype="bfloat16")
    pictures = [Image.open(path).convert("RGB") for path in (FOLDER / "example.png", EXAMPLES / "scene.png")]
    about_one = (
        "what color is the object",
        "what shape is the object",
        "where is the triangle",
        "what is the background",
    )
    asked = [(question, pictures[:1]) for question in about_one] + [("how many objects are there", pictures[1:])]
    inputs = make_prompts(processor, asked)
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]
    assert answers == ["blue", "triangle", "top left", "plain", "four"]
    found = language_test(model, processor)
    assert found is not None
    assert found.same == found.n
    assert found.perplexity == found.perplexity_alone
