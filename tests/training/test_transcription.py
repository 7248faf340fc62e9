"""The objective "transcription": an encoder learns to spell, and what it cannot learn from is refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from omni.data.conversations import ExampleError
from omni.training.objectives import make_objective
from omni.training.recipe import Recipe
from omni.training.run import run
from omni.training.transcription import Transcription, edits

RATE = 16_000
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "time_reduction": 4,
}
ARGUMENTS = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "seed": 0,
}


def recipe(voices: Path, output: Path, **arguments: object) -> Recipe:
    drawn = {"voices": str(voices), "rough": 0}
    return Recipe.model_validate(
        {
            "objective": "transcription",
            "model": {"config": {**TINY, "hidden_dropout_prob": 0.0}},
            "train": {"count": 400, **drawn},
            "evaluate": {"count": 8, "split": "test", **drawn},
            "optimizer": {"lr": 0.003},
            "arguments": {**ARGUMENTS, **arguments},
            "output": str(output),
        }
    )


def test_a_run_learns_and_saves_an_encoder_without_its_head(hummed: Path, tmp_path: Path) -> None:
    output = run(recipe(hummed, tmp_path / "out", max_steps=30, eval_strategy="steps", eval_steps=30))
    history = json.loads((output / "run" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert 0 <= next(entry["eval_word_error"] for entry in history if "eval_word_error" in entry) <= 2
    encoder = AutoModel.from_pretrained(output)
    assert type(encoder).__name__ == "OmniAudioModel"
    assert encoder.config.hidden_size == 32


def test_the_loss_is_what_torch_says_of_each_sound_alone(hummed: Path, tmp_path: Path) -> None:
    objective = make_objective(recipe(hummed, tmp_path / "out"))
    batch = objective.collate([objective.train[number] for number in range(4)])
    model = objective.model.eval()
    with torch.no_grad():
        together = model(**batch)["loss"]
        total = torch.tensor(0.0)
        for number in range(4):
            alone = objective.collate([objective.train[number]])
            logits = model.head(
                model.encoder(input_features=alone["audio_features"], attention_mask=alone["audio_mask"]).grid
            )
            spelled = logits.reshape(1, -1, logits.shape[-1] // 3).log_softmax(-1).transpose(0, 1)
            lengths = torch.tensor([spelled.shape[0]]), torch.tensor([alone["labels"].shape[1]])
            total += torch.nn.functional.ctc_loss(spelled, alone["labels"], *lengths, reduction="sum")
    assert together == pytest.approx((total / batch["slots"].sum()).item(), rel=1e-4)


def test_a_transcript_that_a_sound_has_no_time_for_is_refused(hummed: Path, tmp_path: Path) -> None:
    objective = make_objective(recipe(hummed, tmp_path / "out"))
    sound = np.zeros(RATE // 4, np.float32), RATE
    objective.collate([(sound, "is it")])
    with pytest.raises(
        ExampleError, match=r"has 30 letters, expected 1 to about 21, as many as the sound has time for"
    ):
        objective.collate([(sound, "is it so that this is too long")])
    with pytest.raises(ExampleError, match="letters"):
        objective.collate([(sound, "")])
    with pytest.raises(ExampleError, match=r"has \['é'\], which the first 20,000 transcripts do not have"):
        objective.collate([(sound, "é")])


def test_letters_that_repeat_are_one_and_blanks_are_none() -> None:
    spelling = object.__new__(Transcription)
    spelling.alphabet = " abc"
    assert spelling.spell([0, 2, 2, 0, 2, 3, 3, 1, 0, 4, -100]) == "aab c"


def test_edits_are_the_fewest_of_all_ways() -> None:
    def fewest(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        rest = fewest(one[1:], other[1:]) + (one[0] != other[0])
        return min(rest, 1 + fewest(one[1:], other), 1 + fewest(one, other[1:]))

    for one, other in itertools.product(["", "a", "ab", "bac", "abca", "ccab"], repeat=2):
        assert edits(list(one), list(other)) == fewest(one, other)


def test_lengths_are_those_of_the_transcripts(hummed: Path, tmp_path: Path) -> None:
    train = make_objective(recipe(hummed, tmp_path / "out")).train
    assert train.lengths() == [len(train.transcript(number)) for number in range(len(train))]
