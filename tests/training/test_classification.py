"""The objective "classification": a classifier of pictures or sounds learns, is saved, and is measured class by class."""

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification, pipeline

from omni import OmniVisionModel
from omni.checkpoints.folder import CheckpointError, expect_answers
from omni.data.conversations import ExampleError
from omni.evaluation import choose_settings, evaluate, measure_again
from omni.evaluation.classes import class_scores, confusions
from omni.evaluation.scores import Asked, EvaluationError
from omni.evaluation.tables import remarks, tabulate
from omni.loading.classifier import load_classifier
from omni.loading.encoder import load_encoder
from omni.training.objectives import make_objective
from omni.training.recipe import Recipe, RecipeError
from omni.training.run import run

ARGUMENTS = {
    "num_train_epochs": 6,
    "per_device_train_batch_size": 8,
    "save_strategy": "no",
    "eval_strategy": "epoch",
    "logging_steps": 1,
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "use_cpu": True,
    "report_to": "none",
}


def recipe(encoder: Path, data: Path, output: Path, **changes: Any) -> Recipe:
    settings = {
        "objective": "classification",
        "model": {"encoder": str(encoder)},
        "train": {"path": str(data)},
        "evaluate": {"path": str(data)},
        "optimizer": {"lr": 0.003},
        "arguments": ARGUMENTS,
        "output": str(output),
    }
    return Recipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def trained(small: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of dark and bright pictures of 64 pixels."""
    output = tmp_path_factory.mktemp("classes") / "out"
    model = {"encoder": str(small / "encoder"), "size": 64}
    return run(recipe(small / "encoder", pictures, output, model=model))


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Low and high tones of different lengths, in folders named by their class."""
    root = tmp_path_factory.mktemp("tones")
    for number in range(12):
        folder = root / ("low", "high")[number % 2]
        folder.mkdir(exist_ok=True)
        time = np.arange(4000 + 800 * number) / 16_000
        tone = np.sin(2 * np.pi * (200, 2000)[number % 2] * time) * (0.3 + 0.05 * number)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            file.writeframes((tone * 2**14).astype("<i2").tobytes())
    return root


def test_a_run_tells_its_score_beside_the_best_constant(trained: Path) -> None:
    history = json.loads((trained / "run" / "history.json").read_text())
    scores = [entry for entry in history if "eval_accuracy" in entry]
    assert len(scores) == 6  # of each epoch
    assert scores[-1]["eval_accuracy"] == 1.0
    assert all(entry["eval_best_constant"] == 0.5 for entry in scores)


def test_transformers_takes_it_for_one_of_its_own(trained: Path, pictures: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(trained)
    assert model.config.id2label == {0: "bright", 1: "dark"}
    assert model.config.label2id == {"bright": 0, "dark": 1}
    classify = pipeline("image-classification", str(trained))
    files = [pictures / "dark" / "0.png", pictures / "bright" / "1.png"]
    assert [found[0]["label"] for found in classify([str(file) for file in files])] == ["dark", "bright"]


def test_the_logits_are_those_of_encoder_and_head(trained: Path) -> None:
    classifier = load_classifier(trained)
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    encoder = load_encoder(trained)
    assert isinstance(encoder.model, OmniVisionModel)
    with torch.no_grad():
        encoded = encoder.model(pixel_values=pixels).last_hidden_state
        head = classifier.model.classifier
        expected = torch.cat([encoded[:, 0], encoded[:, 1:].mean(1)], 1) @ head.weight.T + head.bias
        labels = torch.tensor([0, 1, 1])
        output = classifier.model(labels=labels, pixel_values=pixels)
        bare = classifier.model(labels=labels, pixel_values=pixels, return_dict=False)
    torch.testing.assert_close(output.logits, expected)
    assert torch.equal(bare[1], output.logits)
    likelihoods = expected.softmax(-1)[torch.arange(3), labels]
    assert output.loss == pytest.approx(-likelihoods.log().mean().item(), rel=1e-5)


def test_another_size_is_the_encoder_with_interpolated_positions(small: Path) -> None:
    encoder = OmniVisionModel.from_pretrained(small / "encoder").eval()
    torch.nn.init.normal_(encoder.embeddings.position_embeddings)
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = encoder(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        encoder.take_size(96)
        torch.testing.assert_close(encoder(pixel_values=pixels).last_hidden_state, expected)
    assert encoder.config.image_size == 96


def test_damaged_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged, ignore=shutil.ignore_patterns("run"))
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged|changed"):
        load_classifier(damaged)


def test_it_answers_no_questions_and_says_what_to_do(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"classify by pipeline\(\"image-classification\"\) of transformers"):
        expect_answers(trained)


def test_sounds_are_classified_by_the_same_class(small: Path, tones: Path, tmp_path: Path) -> None:
    output = run(recipe(small / "hearing", tones, tmp_path / "out", arguments={**ARGUMENTS, "num_train_epochs": 12}))
    assert load_classifier(output).names == ["high", "low"]
    model = AutoModelForAudioClassification.from_pretrained(output).eval()
    encoder = load_encoder(output, "audio")
    opened = [(np.sin(np.arange(length) / 5), 16_000) for length in (4000, 12_000)]
    with torch.no_grad():
        together = model(**encoder.prepare(opened)).logits
        alone = torch.cat([model(**encoder.prepare([sound])).logits for sound in opened])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    hear = pipeline("audio-classification", str(output))
    assert hear(opened[0][0].astype(np.float32))[0]["label"] in ("high", "low")
    result = evaluate(output, choose_settings(output, data=str(tones))).result
    assert result.score("answer").n == 12


def test_an_evaluation_has_a_score_for_each_class(trained: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pictures, other)
    shutil.move(other / "dark" / "0.png", other / "bright" / "wrong.png")
    outcome = evaluate(trained, choose_settings(trained, data=str(other)))
    assert outcome.result.score("answer").accuracy == 15 / 16
    assert outcome.result.score("answer").constant == 9 / 16
    assert [(each.name, each.n, each.recall, each.precision) for each in outcome.result.classes] == [
        ("bright", 9, 8 / 9, 1.0),
        ("dark", 7, 1.0, 7 / 8),
    ]
    assert "Largest confusions: 1 of 9 'bright' taken for 'dark'." in remarks(outcome.result)
    assert [row[0] for row in tabulate(outcome.result)] == ["class", "all (answer)", "bright", "dark"]
    assert measure_again(outcome.result).differences == []


def test_class_scores_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    expected, given = random.integers(0, 4, 200), random.integers(0, 5, 200)
    asked = [Asked("answer", "", f"c{one}", f"c{other}") for one, other in zip(expected, given, strict=True)]
    names = [f"c{number}" for number in range(5)]
    precision, recall, _, counts = precision_recall_fscore_support(
        [each.expected for each in asked], [each.answer for each in asked], labels=names, zero_division=0
    )
    found = class_scores(asked)
    assert [each.name for each in found] == names
    assert [each.n for each in found] == counts.tolist()
    assert [each.recall for each in found] == pytest.approx(recall.tolist())
    assert [each.precision for each in found] == pytest.approx(precision.tolist())
    table = confusion_matrix(expected, given, labels=range(5))
    np.fill_diagonal(table, 0)
    pairs = confusions(asked)
    assert sum(each.n for each in pairs) == table.sum()
    assert pairs[0].n == table.max()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("0.png", "a"), ("1.png", "a")], "All 2 rows are of the class 'a'"),
        ([("0.png", "a"), ("1.png", "b")], "Each of 2 rows has an answer of its own"),
    ],
)
def test_what_are_no_classes_is_refused(small: Path, tmp_path: Path, rows: list[tuple[str, str]], message: str) -> None:
    for name, _ in rows:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = [json.dumps({"file_name": name, "caption": caption}) for name, caption in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ExampleError, match=message):
        make_objective(recipe(small / "encoder", tmp_path, tmp_path / "out"))


def test_a_class_that_training_lacks_is_refused(small: Path, trained: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures / "dark", tmp_path / "test" / "black")
    shutil.copytree(pictures / "bright", tmp_path / "test" / "bright")
    evaluate_on = {"path": str(tmp_path / "test")}
    with pytest.raises(ExampleError, match="of the class 'black', expected one of the training data: 'bright', 'dark'"):
        make_objective(recipe(small / "encoder", pictures, tmp_path / "out", evaluate=evaluate_on))
    with pytest.raises(EvaluationError, match="is of the class 'black', which the classifier does not know"):
        evaluate(trained, choose_settings(trained, data=evaluate_on["path"]))
    with pytest.raises(EvaluationError, match="name the rows that it is to classify with --data"):
        choose_settings(trained)


def test_wrong_settings_are_refused(small: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="learns from your own files"):
        recipe(small / "encoder", pictures, tmp_path, train={"count": 10})
    with pytest.raises(RecipeError, match=r"`model.size` .* multiple"):
        make_objective(
            recipe(small / "encoder", pictures, tmp_path, model={"encoder": str(small / "encoder"), "size": 50})
        )
    with pytest.raises(RecipeError, match="has a size of its own"):
        make_objective(
            recipe(small / "hearing", pictures, tmp_path, model={"encoder": str(small / "hearing"), "size": 32})
        )
