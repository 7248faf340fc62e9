"""A language model that reads words teaches itself to read items."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from omni.data.conversations import Example, ExampleError, ask
from omni.data.manifests import Manifest
from omni.data.sources import ManifestError
from omni.training.adapters import add_adapters
from omni.training.distillation import Distillation, in_words
from omni.training.objectives import make_objective
from omni.training.recipe import Recipe
from omni.training.run import run
from omni.training.sections import Lora

LORA = {"target_modules": r".*language_model.*q_proj", "modules_to_save": ["image_projector"]}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    found: list[dict[str, Any]] = [
        {"image": "a.png", "caption": "a red square"},
        {"image": "a.png", "question": "which color is it", "answer": "red", "words": "a red square"},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day to you"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return tmp_path / "rows.jsonl"


def recipe_of(small: Path, rows: Path, **more: Any) -> Recipe:
    values = {
        "objective": "distillation",
        "model": {"checkpoint": str(small / "omni")},
        "train": {"path": str(rows)},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "freeze": [r"^(?!model\.image_projector\.)"],
        "arguments": {
            "max_steps": 2,
            "per_device_train_batch_size": 3,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "report_to": "none",
        },
        "output": str(rows.parent / "out"),
    }
    return Recipe.model_validate(values | more)


def test_the_loss_is_the_divergence_from_what_is_said_of_the_words(small: Path, rows: Path) -> None:
    objective = make_objective(recipe_of(small, rows))
    assert isinstance(objective, Distillation)
    batch = objective.collate([objective.train[1]])
    model = objective.model.eval()
    tokenizer = objective.processor.tokenizer
    with torch.no_grad():
        loss = model(**batch).loss
        chats = [ask("a red square\nwhich color is it", "red", items=()), objective.train[1].conversations[0]]
        told = tokenizer.apply_chat_template(chats[0], tokenize=True, return_dict=True, return_tensors="pt")[
            "input_ids"
        ]
        answer = batch["labels"][batch["labels"] != -100]
        n, end = (
            len(answer),
            [i for i in range(told.shape[1]) if told[0, i : i + len(answer)].tolist() == answer.tolist()],
        )
        told_logits = model(input_ids=told).logits[0, end[-1] - 1 : end[-1] - 1 + n]
        shown = {k: v for k, v in batch.items() if k not in ("labels", "teacher")}
        seen_logits = model(**shown).logits
    p, q = F.softmax(told_logits, -1), F.softmax(seen_logits, -1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum() / n, rtol=1e-4, atol=1e-6)


def test_rows_of_text_alone_teach_nothing_but_what_adapters_have_changed(small: Path, rows: Path) -> None:
    objective: Any = make_objective(recipe_of(small, rows))
    batch = objective.collate([objective.train[2]])
    assert abs(objective.model(**batch).loss.item()) < 1e-6
    adapted = add_adapters(objective.model, Lora(**LORA))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    loss = adapted(**objective.collate([objective.train[2]])).loss
    assert loss.item() > 1e-4
    loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(grad is not None and grad.any() for grad in gradients)


def test_a_run_brings_the_picture_nearer_to_its_words(small: Path, rows: Path) -> None:
    arguments = {**recipe_of(small, rows).arguments, "max_steps": 30, "logging_steps": 1}
    recipe = recipe_of(small, rows, arguments=arguments)
    history = json.loads((run(recipe) / "run" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_rows_without_the_words_of_their_items_cannot_be_learnt() -> None:
    with pytest.raises(ExampleError, match="row 7 does not say in words what its picture shows"):
        in_words(Example({"image": [object()]}, [ask("what is it", "red")], "row 7"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["one", "two"], "one text for each of 1 items, found 2"), ("  ", "should be text"), (3, "should be text")],
)
def test_words_are_one_text_for_each_item(rows: Path, words: Any, complaint: str) -> None:
    row = {"image": "a.png", "question": "what is it", "answer": "red", "words": words}
    rows.write_text(json.dumps(row) + "\n")
    with pytest.raises(ManifestError, match=complaint):
        Manifest.read(rows)[0]


def test_lora_on_answers_of_a_word_warns(small: Path, rows: Path) -> None:
    short = {"image": "a.png", "question": "which color is it", "answer": "red"}
    with_text = rows.read_text()
    rows.write_text(json.dumps(short) + "\n")
    recipe = recipe_of(small, rows, objective="answers", freeze=[], lora=LORA)
    with pytest.warns(UserWarning, match=r"short answers \(in words, median: 1\), and may then give no others"):
        make_objective(recipe)
    rows.write_text(with_text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_objective(recipe)
