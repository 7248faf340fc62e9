"""A model knows what training was like: its items, its questions, and how often answers of a confidence are right."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from omni.checkpoints.folder import CheckpointError
from omni.cli.app import app
from omni.evaluation.knowing import area_under_roc, reliability
from omni.evaluation.scores import Asked
from omni.familiarise import familiarise
from omni.knowing.confidence import Calibration, Certainty
from omni.knowing.familiarity import Familiar, Familiarity
from omni.knowing.statistics import Gist, Spread, Wording
from omni.loading.checkpoint import load, save_new
from omni.session import Session
from omni.training.recipe import Recipe
from omni.training.run import run

QUESTIONS = ("which color is it", "what color is this", "tell me the color")


def picture(color: str, seed: int) -> Image.Image:
    """One colour on grey, with a grain."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (32, 32), (128, 128, 128))
    image.paste(color, (int(rng.integers(0, 8)), int(rng.integers(0, 8)), 24, 24))
    return Image.fromarray((np.asarray(image) * 0.9 + rng.integers(0, 20, (32, 32, 3))).astype(np.uint8))


def rows(folder: Path, name: str, count: int, first: int) -> Path:
    """A manifest of questions about pictures of one colour."""
    lines = []
    for number in range(first, first + count):
        color, place = ("red", "blue")[number % 2], folder / f"{number}.png"
        picture(color, number).save(place)
        lines.append({"image": place.name, "question": QUESTIONS[number % 3], "answer": color})
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl`, `held_out.jsonl`, an encoder and a Thinker."""
    from omni import OmniImageProcessor, OmniVisionConfig, OmniVisionModel

    folder = tmp_path_factory.mktemp("knowing")
    rows(folder, "train.jsonl", 160, 0)
    rows(folder, "held_out.jsonl", 80, 1000)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    OmniVisionModel(OmniVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "encoder")
    OmniImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "encoder")
    text = {"model_type": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, **sizes}
    (folder / "thinker.json").write_text(json.dumps(text))
    return folder


def recipe(data: Path, output: Path, steps: int = 12) -> Recipe:
    image = {"encoder": str(data / "encoder"), "output": "cls+grid", "projector": "mlp"}
    return Recipe.model_validate(
        {
            "objective": "answers",
            "model": {"thinker": str(data / "thinker.json"), "vocab_size": 300, "image": image},
            "train": {"path": str(data / "train.jsonl")},
            "evaluate": {"path": str(data / "held_out.jsonl")},
            "optimizer": {"name": "adamw", "lr": 0.003},
            "arguments": {
                "max_steps": steps,
                "per_device_train_batch_size": 16,
                "save_steps": 6,
                "eval_strategy": "no",
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "remove_unused_columns": False,
                "label_names": ["labels"],
                "seed": 0,
            },
            "output": str(output),
        }
    )


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A model that `omni train` has made, with what it writes at the end."""
    return run(recipe(data, data / "trained"))


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    shutil.copytree(trained, tmp_path / "copied", ignore=shutil.ignore_patterns("run"))
    return tmp_path / "copied"


def test_training_writes_what_it_was_like(trained: Path) -> None:
    found = Familiarity.read(trained)
    assert found is not None
    assert set(found.items) == {"image"}
    assert found.question is not None
    assert found.calibration is not None
    assert found.calibration.answers == 80
    assert load(trained)[0].familiarity == found


def test_a_resumed_run_writes_the_same(data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, data / "again")
    for name in ("config.json", "familiarity.json", "familiarity_seal.json"):
        (data / "again" / name).unlink()
    shutil.rmtree(data / "again" / "run" / "checkpoint-12")
    settings = json.loads((data / "again" / "run" / "recipe.json").read_text())
    settings["output"] = str(data / "again")
    (data / "again" / "run" / "recipe.json").write_text(json.dumps(settings))
    output = run(recipe(data, data / "again"), resume=True)
    assert (output / "familiarity.json").read_bytes() == (trained / "familiarity.json").read_bytes()


def test_of_a_few_rows_nothing_is_known(data: Path, tmp_path: Path) -> None:
    output = run(recipe(data, tmp_path / "short", steps=1))
    assert not (output / "familiarity.json").exists()
    said = Session(*load(output), [picture("red", 1)]).ask(QUESTIONS[0], 4)
    assert (said.confidence, said.familiar) == (None, None)


def test_an_answer_says_what_is_strange(trained: Path) -> None:
    model, processor = load(trained)
    alike = [Session(model, processor, [picture("red", 2000 + n)]).ask(QUESTIONS[n % 3], 4) for n in range(20)]
    assert sum(each.familiar.items == [True] for each in alike if each.familiar) >= 17
    assert all(each.familiar.question for each in alike if each.familiar)
    assert all(each.confidence is not None and 0 <= each.confidence <= 1 for each in alike)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    session = Session(model, processor, [noise, picture("blue", 3000)])
    said = session.ask("who painted the old man", 4)
    assert said.familiar == Familiar(items=[False, True], question=False)
    assert (
        said.familiar.note(["image", "image"]) == "Picture 1 and the question are unlike what the model was trained on."
    )
    assert session.ask(QUESTIONS[0], 4).familiar == Familiar(items=[False, True], question=True)
    *_, last = session.stream(QUESTIONS[0], 4)
    assert last.familiar == Familiar(items=[False, True], question=True)


def test_the_reference_judges_as_the_fast_path(trained: Path) -> None:
    from omni.fusion.acceleration import Acceleration, using

    model, processor = load(trained)
    fast = [Session(model, processor, [picture("red", n)]).ask(QUESTIONS[0], 4) for n in range(5)]
    with using(Acceleration()):
        plain = [Session(model, processor, [picture("red", n)]).ask(QUESTIONS[0], 4) for n in range(5)]
    assert [each.familiar for each in fast] == [each.familiar for each in plain]
    assert [each.confidence for each in fast] == pytest.approx([each.confidence for each in plain], abs=1e-3)


def test_statistics_that_were_changed_are_refused(copied: Path) -> None:
    path = copied / "familiarity.json"
    path.write_text(path.read_text().replace('"threshold":', '"threshold":9'))
    with pytest.raises(CheckpointError, match="familiarity.json is damaged or changed"):
        load(copied)


def test_statistics_of_other_weights_are_refused(copied: Path) -> None:
    values = json.loads((copied / "familiarity.json").read_text())
    values["weights"]["image_tower"] = "0" * 32
    (copied / "familiarity.json").write_text(json.dumps(values))
    assert CliRunner().invoke(app, ["checkpoint", "seal", str(copied)]).exit_code == 0
    with pytest.raises(CheckpointError, match="measured on other weights"):
        load(copied)


def test_statistics_go_along_with_a_copy(trained: Path, tmp_path: Path) -> None:
    model, processor = load(trained)
    assert load(save_new(model, processor, tmp_path / "copy"))[0].familiarity == model.familiarity


def test_the_commands_say_what_is_known(copied: Path, data: Path, tmp_path: Path) -> None:
    """ask, checkpoint familiarise and evaluate, on a checkpoint that knows nothing and then learns it."""
    Familiarity.remove(copied)
    known, strange = tmp_path / "known.png", tmp_path / "strange" / "noise.png"
    strange.parent.mkdir()
    picture("red", 4001).save(known)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(strange)

    def omni(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(each) for each in arguments])

    asked = omni("ask", known, QUESTIONS[0], "--checkpoint", copied, "--json")
    assert json.loads(asked.stdout)["familiar"] is None
    assert omni("ask", known, QUESTIONS[0], "--checkpoint", copied, "--strict").exit_code == 2
    options: tuple[Any, ...] = ("--data", data / "train.jsonl", "--held-out", data / "held_out.jsonl")
    learnt = omni("checkpoint", "familiarise", copied, *options)
    assert learnt.exit_code == 0, learnt.stderr
    assert "80 held-out answers" in learnt.stdout
    asked = omni("ask", known, QUESTIONS[0], "--checkpoint", copied, "--strict", "--json")
    assert (asked.exit_code, json.loads(asked.stdout)["familiar"]) == (0, {"items": [True], "question": True})
    document = copied / "familiarity.json"
    whole = document.read_text()
    document.write_text(json.dumps({**json.loads(whole), "items": {}}))
    asked = omni("ask", known, QUESTIONS[0], "--checkpoint", copied, "--strict")
    assert asked.exit_code == 2
    assert "does not say what the model was trained on (modality 'image')" in asked.stderr
    document.write_text(whole)
    asked = omni("ask", strange, QUESTIONS[0], "--checkpoint", copied, "--strict")
    assert asked.exit_code == 3
    assert asked.stderr == "The picture is unlike what the model was trained on. Its answer may mean nothing.\n"
    options = ("--data", data / "held_out.jsonl", "--strangers", strange.parent, "--json")
    found = json.loads(omni("evaluate", copied, *options).stdout)
    assert found["reliability"]["n"] == 80
    (told,) = found["strangers"]
    assert (told["kind"], told["n"], told["area"], told["found"]) == ("picture", 1, 1.0, 1.0)
    assert told["false_alarms"] <= 0.1


def test_without_held_out_rows_confidence_is_unknown(copied: Path, data: Path) -> None:
    from omni.data.manifests import Manifest, ManifestConversations

    found = familiarise(copied, ManifestConversations(Manifest.read(data / "train.jsonl")))
    assert found is not None
    assert found.calibration is None
    assert set(found.items) == {"image"}


# --- The numbers ------------------------------------------------------------------------------------------------------


def test_a_spread_of_all_directions_is_the_distance_of_mahalanobis() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 6)) @ rng.normal(size=(6, 6)) + 5
    items = [Gist(each, 1) for each in vectors]
    spread = Spread.fit(items)
    away = vectors[:20] - vectors.mean(0)
    exact = np.einsum("ni,ij,nj->n", away, np.linalg.inv(np.cov(vectors.T)), away)
    assert len(spread.directions) == 5  # the sixth is "the rest"
    assert [spread.distance(each) for each in items[:20]] == pytest.approx(exact, rel=0.05)
    assert Spread.model_validate_json(spread.model_dump_json()) == spread


def test_a_threshold_takes_half_a_twentieth_for_strangers() -> None:
    rng = np.random.default_rng(0)
    fitted, held_out, others = ([Gist(each, 1) for each in rng.normal(size=(n, 20))] for n in (1000, 1000, 4000))
    spread = Spread.fit(fitted).with_threshold([held_out])
    assert np.mean([not spread.knows(each) for each in others]) == pytest.approx(0.025, abs=0.015)


def test_a_threshold_holds_for_every_kind_of_row() -> None:
    """Of many near rows and few far ones, as many of the far ones are known."""
    rng = np.random.default_rng(0)

    def items(count: int, scale: float) -> list[Gist]:
        return [Gist(each, 1) for each in rng.normal(scale=scale, size=(count, 20))]

    spread = Spread.fit(items(900, 1.0) + items(100, 2.0)).with_threshold([items(900, 1.0), items(100, 2.0)])
    assert np.mean([not spread.knows(each) for each in items(2000, 2.0)]) < 0.06
    assert np.mean([not spread.knows(each) for each in items(2000, 1.0)]) < 0.01


def test_a_threshold_of_few_rows_is_their_largest_distance() -> None:
    """With 38 rows a new one is the farthest of all with a chance of 1/39, which is more than 1/40."""
    items = [Gist(each, 1) for each in np.random.default_rng(0).normal(size=(38, 4))]
    spread = Spread.fit(items).with_threshold([items[:10], items[10:]])
    assert spread.threshold == pytest.approx(max(map(spread.distance, items)), rel=1e-4)


def test_the_mean_of_few_tokens_is_no_stranger() -> None:
    """Sounds of 2 to 60 tokens: each has a mean of its own, and its tokens vary around it."""
    rng = np.random.default_rng(0)

    def items(count: int, lengths: tuple[int, int]) -> list[Gist]:
        tokens = rng.integers(*lengths, count)
        return [Gist(rng.normal(size=8) + rng.normal(scale=4 / n**0.5, size=8), int(n)) for n in tokens]

    spread = Spread.fit(items(2000, (2, 60))).with_threshold([items(2000, (2, 60))])
    alarms = [np.mean([not spread.knows(each) for each in items(2000, lengths)]) for lengths in ((2, 6), (40, 60))]
    assert spread.few > 1
    assert alarms[0] < 0.15
    assert alarms[1] > 0.005


def test_a_pair_of_tokens_that_never_was_surprises_more() -> None:
    wording = Wording.fit([[1, 2, 3], [1, 2, 4], [1, 2, 3]])
    assert wording.distance([1, 2, 3]) < wording.distance([1, 2, 4]) < wording.distance([1, 3, 2])
    assert wording.distance([1, 3, 2]) < wording.distance([7, 8, 9])


def test_confidence_is_the_share_that_is_right() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(2, 2, 4000)
    logprobs = -np.log1p(np.exp(-odds))
    right = rng.random(4000) < 1 / (1 + np.exp(-(0.5 * odds + 1.0)))
    fitted = Calibration.fit([[each / 2] * 2 for each in logprobs[:2000]], list(right[:2000]))
    assert (fitted.slope, fitted.offset) == pytest.approx((0.5, 1.0), abs=0.15)
    asked = [
        Asked("", "", "yes", "yes" if hit else "no", confidence=fitted.confidence([each]))
        for each, hit in zip(logprobs[2000:], right[2000:], strict=True)
    ]
    found = reliability(asked)
    assert found is not None
    assert found.error < 0.04
    assert sum(n for _, _, n in found.bins) == 2000
    sure = reliability([Asked("", "", "a", "b", confidence=1.0)] * 30)
    assert sure is not None
    assert sure.error == 1.0
    assert reliability([Asked("", "", "a", "b")]) is None


def test_tokens_count_until_the_one_that_ends_an_answer() -> None:
    noted = Certainty()
    steps = torch.randn(3, 2, 10, generator=torch.Generator().manual_seed(0))
    for scores in steps:
        assert noted(torch.zeros(2, 1), scores) is scores
    written = steps.argmax(-1).T.clone()
    written[1] = torch.tensor([5, 9, 9])
    first, second = noted.of(written, [9, 11])
    expected = steps.log_softmax(-1).amax(-1).T
    assert first == pytest.approx(expected[0][: len(first)].tolist(), abs=1e-5)
    assert second == pytest.approx(expected[1, :2].tolist(), abs=1e-5)


def test_the_area_under_the_curve_counts_pairs() -> None:
    rng = random.Random(0)
    alike, strange = ([rng.randint(0, 9) + shift for _ in range(40)] for shift in (0, 2))
    pairs = [(b > a) + 0.5 * (b == a) for a in alike for b in strange]
    assert area_under_roc(alike, strange) == pytest.approx(sum(pairs) / len(pairs))
