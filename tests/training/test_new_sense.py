"""A checkpoint gets a further modality: its weights stay the same, and the new projector counts as untrained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from omni import OmniAudioModel, OmniProcessor
from omni.audio.sound import Sound
from omni.checkpoints.folder import CheckpointError
from omni.loading.checkpoint import load
from omni.questions import make_prompts
from omni.training.fused import build_omni
from omni.training.recipe import Recipe
from omni.training.run import run

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
SOUND = Sound(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000)


@pytest.fixture
def hearing(small: Path) -> str:
    """The folder of a tiny encoder of sounds."""
    return str(small / "hearing")


def section(encoder: str) -> dict[str, dict[str, object]]:
    return {"audio": {"encoder": encoder, "projector": "unshuffle_mlp", "factor": 2, "output": "grid"}}


def test_what_a_model_knew_stays(small: Path, hearing: str) -> None:
    old, processor = load(small / "omni")
    new, wider = build_omni(checkpoint=str(small / "omni"), modalities=section(hearing))
    prompts = make_prompts(processor, [("what is it", [PICTURE]), ("what", [])])
    same = make_prompts(wider, [("what is it", [PICTURE]), ("what", [])])
    assert all(torch.equal(same[key], value) for key, value in prompts.items())
    with torch.no_grad():
        before, after = old.eval()(**prompts).logits, new.eval()(**prompts).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before, rtol=0, atol=1e-6)
    assert new.config.untrained == ["audio_projector"]
    assert new.config.modalities["audio"]["token_id"] == len(processor.tokenizer)
    assert wider.preprocessors["audio"].mean == -4.5


def test_the_encoder_is_the_one_of_the_folder(small: Path, hearing: str) -> None:
    new, _ = build_omni(checkpoint=str(small / "omni"), modalities=section(hearing))
    expected = OmniAudioModel.from_pretrained(hearing).state_dict()
    found = new.model.audio_tower.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.new_chats
def test_a_prompt_holds_sounds_and_pictures(small: Path, hearing: str) -> None:
    new, processor = build_omni(checkpoint=str(small / "omni"), modalities=section(hearing))
    prompt = make_prompts(processor, [("", [PICTURE, PICTURE, SOUND])])
    counts = {
        name: int((prompt["input_ids"] == each["token_id"]).sum()) for name, each in new.config.modalities.items()
    }
    assert counts == {"image": 2 * 50, "audio": 7}  # 101 frames, 13 tokens of 8 frames, two and two together
    new.config.untrained = []
    with torch.no_grad():
        assert torch.isfinite(new.eval()(**prompt).logits).all()


def test_a_run_gives_a_sense_that_answers_nothing_before_it_heard_something(
    small: Path, hearing: str, tmp_path: Path
) -> None:
    for number in range(4):
        PICTURE.save(tmp_path / f"{number}.png")
    rows = [f'{{"image": "{number}.png", "caption": "a picture"}}\n' for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    arguments = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
    recipe = {
        "objective": "answers",
        "model": {"checkpoint": str(small / "omni"), "modalities": section(hearing)},
        "train": {"path": str(tmp_path / "rows.jsonl")},
        "optimizer": {"lr": 0.001},
        "arguments": {**arguments, "remove_unused_columns": False, "use_cpu": True},
        "output": str(tmp_path / "out"),
    }
    run(Recipe.model_validate(recipe))
    assert set(OmniProcessor.from_pretrained(tmp_path / "out").preprocessors) == {"audio", "image"}
    with pytest.raises(CheckpointError, match="audio_projector is untrained"):
        load(tmp_path / "out")
