"""Neighbours, probes and retrieval agree with plain loops, and an encoder's scores are about the encoder."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPModel,
    GPT2Config,
    GPT2Model,
    SiglipImageProcessorPil,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from omni import scenes
from omni.checkpoints.folder import CheckpointError
from omni.evaluation import EncoderSettings, EvaluationError, evaluate
from omni.evaluation.picture_sets import DIGIT, digit_pictures
from omni.evaluation.probing import SAME, evaluate_encoder, features_of, nearest, neighbours, probe
from omni.loading.encoder import load_encoder
from omni.scenes.picture_sets import OBJECT_TASKS, SCENE_TASKS, TASKS

SIZE = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"height": 16, "width": 16}
SMALL = EncoderSettings(pictures=20, fit_pictures=100)
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save(model, processor)`: the folder of a checkpoint."""

    def save(*parts: Any) -> Path:
        for part in parts:
            part.save_pretrained(tmp_path / "encoder")
        return tmp_path / "encoder"

    return save


def new(model_type: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **{**SIZE, "intermediate_size": 32, **changes}))


# --- Methods ----------------------------------------------------------------------------------------------------------


def test_neighbours_vote_as_in_a_loop() -> None:
    random = np.random.default_rng(0)
    centres = random.standard_normal((4, 8))
    labels = [int(label) for label in random.integers(0, 4, 150)]
    known = centres[labels] + random.standard_normal((150, 8))
    asked = random.standard_normal((40, 8)) * 100  # lengths do not matter
    expected = []
    for query in asked:
        cosine = [query @ one / np.linalg.norm(query) / np.linalg.norm(one) for one in known]
        votes = Counter("abcd"[labels[place]] for place in np.argsort(cosine)[::-1][:20])
        expected.append(min(votes, key=lambda label: (-votes[label], label)))
    assert neighbours(known, ["abcd"[label] for label in labels], asked, 20) == expected
    assert len(set(expected)) == 4


def test_a_probe_reads_what_is_linear_and_not_what_is_not() -> None:
    random = np.random.default_rng(0)
    known, asked = random.standard_normal((2, 400, 6)) * [1, 1, 1, 1, 1, 1e-4] + 5

    def accuracy(answers: Callable[[Any], Any]) -> float:
        given = probe(known, [str(a) for a in answers(known)], asked)
        return float(np.mean([found == str(a) for found, a in zip(given, answers(asked), strict=True)]))

    assert accuracy(lambda x: x[:, 5] > 5) > 0.95  # also what hardly varies: features are standardised
    assert accuracy(lambda x: ((x[:, 0] > 5) ^ (x[:, 1] > 5)).astype(int)) < 0.65


def test_recall_is_that_of_a_loop() -> None:
    random = np.random.default_rng(0)
    gallery = random.standard_normal((30, 6))
    queries = gallery + random.standard_normal((30, 6))
    for k in (1, 5):
        found = nearest(queries, gallery, k)
        hits = 0
        for place, query in enumerate(queries):
            cosine = [query @ one / np.linalg.norm(query) / np.linalg.norm(one) for one in gallery]
            hits += sum(other > cosine[place] for other in cosine) < k
            assert found[place, 0] == np.argmax(cosine)
        assert sum(place in row for place, row in enumerate(found)) == hits
        assert 0 < hits < 30


def test_what_is_the_same_for_all_pictures_finds_none() -> None:
    same = np.ones((10, 4))
    assert not any(place in row for place, row in enumerate(nearest(same, same, 5)))
    assert (nearest(np.zeros((10, 4)), np.zeros((10, 4)), 1) >= 0).all()


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    digits = digit_pictures(16)
    assert (len(digits.fit), len(digits.ask), len(digits)) == (1437, 360, 1797)
    assert set(digits.fit).isdisjoint(digits.ask)
    assert digit_pictures(16).ask == digits.ask
    counts = Counter(digits.labels["digit"][place] for place in digits.ask)
    assert len(counts) == 10
    assert max(counts.values()) - min(counts.values()) <= 3
    assert digits.pixels is not None
    picture = digits.draw(5)
    assert (picture.mode, picture.size) == ("RGB", (16, 16))
    small = np.asarray(picture.resize((8, 8)).convert("L"), dtype=float).ravel()
    assert np.corrcoef(small, digits.pixels[5])[0, 1] > 0.9


# --- Encoders ---------------------------------------------------------------------------------------------------------


def test_features_are_the_encoders_own(vision: Path) -> None:
    encoder = load_encoder(vision)
    pixels = encoder.prepare([scenes.render(scenes.sample_scene(seed, "test")) for seed in range(3)])
    found = features_of(encoder.encode(pixels))
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(vision)(**pixels).last_hidden_state.numpy()
    assert found["cls"] == pytest.approx(hidden[:, 0], abs=1e-5)
    assert found["grid"] == pytest.approx(hidden[:, 1:].mean(1), abs=1e-5)


def test_the_shipped_encoder_sees(vision: Path) -> None:
    settings = EncoderSettings(pictures=15, fit_pictures=100, kinds=("background", "dark", "same objects"))
    outcome = evaluate(vision, settings)
    for task in ("background", "dark"):
        assert outcome.result.score(f"{task} / probe / cls").accuracy > 0.9
    found = outcome.result.score("same objects / recall@5 / grid")
    assert (found.n, found.constant, found.constant_answer) == (15, 5 / 15, "chance")
    assert found.accuracy > found.constant
    assert evaluate(vision, settings).result.hashes == outcome.result.hashes


def test_an_encoder_without_training_scores_as_its_own_baseline(save: Save) -> None:
    """Drawn from the seed of the baseline, it is the baseline; all sorts of scores are there, each with its interval."""
    folder = save(new("vit"), ViTImageProcessorPil(size=SQUARE))
    outcome = evaluate(folder, SMALL)
    by_kind = {score.kind: score for score in outcome.result.scores}
    expected = [
        f"{task} / {method} / {output}"
        for task in (*SCENE_TASKS, *OBJECT_TASKS)
        for output in ("cls", "grid")
        for method in ("kNN", "probe")
    ]
    expected += [f"same objects / recall@{k} / {output}" for output in ("cls", "grid") for k in (1, 5)]
    digits = [("digit", o) for o in ("cls", "grid")] + [("digit, untrained", o) for o in ("cls", "grid")]
    expected += [
        f"{task} / {m} / {o}" for task, o in [*digits, ("digit, projection", "pixels")] for m in ("kNN", "probe")
    ]
    assert sorted(by_kind) == sorted(expected)
    assert {kind.split(",")[0].split(" / ")[0] for kind in by_kind} == {*TASKS, SAME, DIGIT}
    for output in ("cls", "grid"):
        for method in ("kNN", "probe"):
            mine, untrained = (
                by_kind[f"digit / {method} / {output}"],
                by_kind[f"digit, untrained / {method} / {output}"],
            )
            assert mine.accuracy == untrained.accuracy
            assert mine.n == 360
    assert by_kind["digit, projection / probe / pixels"].accuracy > 0.85
    assert all(score.low <= score.accuracy <= score.high for score in by_kind.values())
    for asked in outcome.asked[::97]:
        assert outcome.items(asked.example)["image"][0].mode == "RGB"
    assert [len(outcome.items(example)["image"]) for example in (0, 45)] == [
        1,
        2,
    ]  # a scene drawn again, and the first drawing


def test_a_trained_encoder_differs_from_the_baseline(save: Save) -> None:
    model = new("omni_vision")
    torch.manual_seed(1)
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    from omni import OmniImageProcessor

    report = evaluate_encoder(
        load_encoder(save(model, OmniImageProcessor(size=SQUARE))),
        EncoderSettings(pictures=10, fit_pictures=100, kinds=("digit",)),
    )
    mine, untrained = (
        [asked.answer for asked in report.asked if asked.kind == f"{task} / probe / cls"]
        for task in ("digit", "digit, untrained")
    )
    assert len(mine) == 360
    assert mine != untrained


@pytest.mark.parametrize("kind", ["siglip", "clip", "vit classifier"])
def test_encoders_of_transformers(kind: str, save: Save) -> None:
    if kind == "siglip":
        folder = save(new("siglip_vision_model"), SiglipImageProcessorPil(size=SQUARE))
    elif kind == "clip":
        vision = {**SIZE, "intermediate_size": 32}
        text = {key: value for key, value in vision.items() if "size" not in key or key == "hidden_size"}
        config = AutoConfig.for_model("clip", vision_config=vision, text_config={**text, "vocab_size": 50})
        folder = save(CLIPModel(config), CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE))
    else:
        folder = save(ViTForImageClassification(new("vit").config), ViTImageProcessorPil(size=SQUARE))
    encoder = load_encoder(folder)
    features = features_of(
        encoder.encode(encoder.prepare([scenes.render(scenes.sample_scene(seed)) for seed in range(2)]))
    )
    assert {name: values.shape for name, values in features.items()} == {"cls": (2, 24), "grid": (2, 24)}
    assert not np.allclose(features["cls"][0], features["cls"][1])
    assert {
        name: f.shape
        for name, f in features_of(
            encoder.untrained(0).encode(encoder.prepare([scenes.render(scenes.sample_scene(0))]))
        ).items()
    } == {"cls": (1, 24), "grid": (1, 24)}


def test_what_is_no_encoder_is_refused(save: Save, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded as an encoder"):
        load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="preprocessor"):
        load_encoder(save(new("vit")))
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    with pytest.raises(CheckpointError, match=r"Input image size \(32\*32\) doesn't match model \(16\*16\)"):
        load_encoder(save(new("vit"), processor))
    with pytest.raises(CheckpointError, match="a model of type 'gpt2' is no encoder of any modality here"):
        load_encoder(save(GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9)), processor))


def test_weights_that_are_not_whole_are_refused(save: Save) -> None:
    folder = save(new("vit"), ViTImageProcessorPil(size=SQUARE))
    new("vit", hidden_size=32).config.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"its weights lack or mis-shape embeddings.cls_token.* and \d+ more"):
        load_encoder(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_encoder(folder)


def test_without_scikit_learn_the_extra_is_named(vision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)  # how Python marks what cannot be imported
    with pytest.raises(EvaluationError, match=r'pip install "omni-thinker\[eval\]"'):
        evaluate(vision, SMALL)


def test_unknown_kinds(vision: Path) -> None:
    with pytest.raises(EvaluationError, match=r"Unknown kinds of questions \['where'\] for an encoder; known: count"):
        evaluate(vision, EncoderSettings(kinds=("where",)))
