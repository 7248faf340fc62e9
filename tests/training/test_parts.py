"""Parts while others learn: frozen ones keep their numbers and cost no memory, and only what had a gradient is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from omni import OmniConfig, OmniForConditionalGeneration, OmniProcessor
from omni.checkpoints.fingerprints import part_of
from omni.checkpoints.folder import CheckpointError
from omni.loading.checkpoint import load
from omni.training.parts import CHECKPOINTING, FrozenParts, freeze
from omni.training.run import run

from .conftest import two_steps


@pytest.fixture
def half(small: Path, tmp_path: Path) -> Path:
    """The fused model with a language model in bfloat16, as real ones are, and a projector that nobody has trained."""
    model, folder = OmniForConditionalGeneration.from_pretrained(small / "omni"), tmp_path / "half"
    model.model.language_model.to(torch.bfloat16)
    model.config.untrained = ["image_projector"]
    model.save_pretrained(folder)
    OmniProcessor.from_pretrained(small / "omni").save_pretrained(folder)
    return folder


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Conversations that show nothing."""
    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a red circle"}]
    (tmp_path / "words.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 4)
    return tmp_path / "words.jsonl"


def kinds(tensors: dict[str, torch.Tensor]) -> dict[str, torch.dtype]:
    return {part_of(name): tensor.dtype for name, tensor in tensors.items()}


def test_frozen_parts_stay_in_their_precision(half: Path, pictures: Path, tmp_path: Path) -> None:
    before = load_file(half / "model.safetensors")
    after = load_file(run(two_steps("projector", half, tmp_path / "out", pictures)) / "model.safetensors")
    assert kinds(before) == kinds(after)
    assert kinds(after) == {
        "image_tower": torch.float32,
        "image_projector": torch.float32,
        "language_model": torch.bfloat16,
    }
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"image_projector"}
    model, _ = load(tmp_path / "out")  # it has learnt, so it answers
    assert model.config.untrained == []


def test_what_learns_is_float32(half: Path, pictures: Path, tmp_path: Path) -> None:
    model = OmniForConditionalGeneration.from_pretrained(half, dtype=torch.bfloat16)
    model.save_pretrained(half)
    learning = {"freeze": ["image_tower", "language_model"]}
    after = load_file(run(two_steps("projector", half, tmp_path / "out", pictures, **learning)) / "model.safetensors")
    assert kinds(after) == {
        "image_tower": torch.bfloat16,
        "image_projector": torch.float32,
        "language_model": torch.bfloat16,
    }
    OmniForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_adapters_of_a_model_in_bfloat16_hold_what_was_trained_and_nothing_else(
    half: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    lora = {"target_modules": ".*language_model.*q_proj", "modules_to_save": ["image_projector"]}
    saved = load_file(run(two_steps("lora", half, tmp_path / "out", pictures, lora=lora)) / "adapter_model.safetensors")
    assert all("lora_" in name or "image_projector" in name for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    model, _ = load(tmp_path / "out")
    assert model.config.untrained == []


@pytest.mark.parametrize("name", ["pictures", "lora"])
def test_a_part_without_a_gradient_stays_untrained(name: str, half: Path, words: Path, tmp_path: Path) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    settings = two_steps(name, half, tmp_path / "out", words, optimizer={"name": "adamw", "lr": 0.001})
    run(settings)
    for folder in (tmp_path / "out", tmp_path / "out" / "run" / "checkpoint-1"):
        with pytest.raises(CheckpointError, match="image_projector is untrained"):
            load(folder)


def test_what_was_learnt_before_an_interruption_counts(half: Path, pictures: Path, tmp_path: Path) -> None:
    """Also if nothing is left to be done but to write the result."""
    settings = two_steps("projector", half, tmp_path / "out", pictures)
    run(settings)
    for file in (tmp_path / "out").glob("*.*"):
        file.unlink()
    assert json.loads((half / "config.json").read_text())["untrained"] == ["image_projector"]
    model, _ = load(run(settings, resume=True))
    assert model.config.untrained == []


@pytest.mark.parametrize("thinker", ["qwen3", "opt"])
def test_activations_of_a_frozen_language_model_are_recomputed(
    thinker: str, make_config: Callable[..., OmniConfig]
) -> None:
    """Backward goes through it to the projector. Layers of OPT have dropout of their own, which stays off."""
    torch.manual_seed(0)
    dropout = {"dropout": 0.5} if thinker == "opt" else {}
    model = OmniForConditionalGeneration(make_config(thinker, text={"num_hidden_layers": 4, **dropout}))
    model.config.use_cache = False
    freeze(model, ["^(?!model.image_projector)"])
    frozen = FrozenParts(model)
    token = model.config.image_token_id
    tokens = model.config.num_tokens("image", (2, 2))
    ids = torch.tensor([[token] * tokens + [5] * 20] * 2)
    batch = {"input_ids": ids, "labels": ids, "pixel_values": torch.rand(2, 3, 16, 16)}

    def step() -> tuple[torch.Tensor, dict[str, Any], int]:
        kept: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t
        )
        with hooks:
            loss = model.train()(**batch).loss
        model.zero_grad()
        loss.backward()
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept)

    loss, gradients, kept = step()
    assert {part_of(name) for name in gradients} == {"image_projector"}
    arguments = TrainingArguments(use_cpu=True, report_to="none", **{CHECKPOINTING: True})
    frozen.on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    again, same, fewer = step()
    assert fewer < kept / 2
    assert torch.equal(loss, again)
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)


def test_half_frozen_parts_keep_training() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    )
    freeze(model, [r"^0\."])
    FrozenParts(model)
    model.train()(torch.ones(1, 2))
    assert [module.training for module in model.modules()] == [True, False, False, False, True, True, True]
