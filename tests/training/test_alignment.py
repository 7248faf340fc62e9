"""The objective "alignment": sounds come near the embeddings of their words, and nothing else of the model changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from omni.data.conversations import ExampleError
from omni.loading.checkpoint import load
from omni.training.objectives import make_objective
from omni.training.recipe import Recipe
from omni.training.run import run

ARGUMENTS = {"per_device_train_batch_size": 8, "save_steps": 6, "logging_steps": 1, "use_cpu": True, "seed": 0}


def recipe(small: Path, hummed: Path, output: Path, **arguments: object) -> Recipe:
    audio = {"encoder": str(small / "hearing"), "projector": "unshuffle_mlp", "factor": 1, "output": "grid"}
    return Recipe.model_validate(
        {
            "objective": "alignment",
            "model": {"checkpoint": str(small / "omni"), "modalities": {"audio": audio}},
            "train": {"count": 200, "voices": str(hummed), "rough": 0, "said": ["question", "digits"], "fastest": 6.0},
            "evaluate": {"count": 8, "voices": str(hummed), "rough": 0, "said": ["question"], "split": "test"},
            "freeze": ["language_model", "image_"],
            "optimizer": {"lr": 0.003},
            "arguments": {**ARGUMENTS, "report_to": "none", **arguments},
            "output": str(output),
        }
    )


def test_a_run_learns_and_its_model_counts_as_trained(small: Path, hummed: Path, tmp_path: Path) -> None:
    output = run(recipe(small, hummed, tmp_path / "out", max_steps=12, eval_strategy="steps", eval_steps=12))
    history = json.loads((output / "run" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert any("eval_word_error" in entry for entry in history)
    model, processor = load(output)
    assert set(processor.preprocessors) == set(model.config.modalities) == {"audio", "image"}
    before, after = load_file(small / "omni" / "model.safetensors"), load_file(output / "model.safetensors")
    changed = [name for name, tensor in before.items() if not torch.equal(after[name][: len(tensor)], tensor)]
    assert changed == []


def test_what_is_near_a_word_spells_it(small: Path, hummed: Path, tmp_path: Path) -> None:
    objective = make_objective(recipe(small, hummed, tmp_path / "out"))
    batch = objective.collate([objective.train[number] for number in range(4)])
    model = objective.model.eval()
    words = model.fused.get_input_embeddings().weight
    row = batch["labels"][0][batch["labels"][0] >= 0]
    middle = words.mean(0)
    told = torch.stack([piece for word in row for piece in (words[word], model.blank + middle)])

    def encode(name: str, **inputs: torch.Tensor) -> object:
        return type("Encoded", (), {"pooler_output": [told.detach()] * 4})

    model.fused.get_features = encode  # type: ignore[method-assign]
    slots = torch.full((4,), len(told))
    with torch.no_grad():
        spelled = model(batch["audio_features"], batch["audio_mask"], slots, batch["labels"][:1].expand(4, -1))[
            "spelled"
        ]
    assert objective.spell(spelled[0].tolist()) == objective.processor.tokenizer.decode(row)
    assert F.cosine_similarity(model.blank, words[row[0]] - middle, dim=0) < 0.9


def test_a_sound_too_short_for_its_words_is_refused(small: Path, hummed: Path, tmp_path: Path) -> None:
    objective = make_objective(recipe(small, hummed, tmp_path / "out"))
    with pytest.raises(ExampleError, match="tokens, expected 1 to 4, the tokens of its sound"):
        objective.collate([((np.zeros(4000, np.float32), 16_000), "what shape is the red object at the top left")])
