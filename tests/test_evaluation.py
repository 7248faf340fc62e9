"""Scores are counted right, and the shipped checkpoint sees: its answers fall apart when the picture is taken away."""

import math
from pathlib import Path

import pytest

from omni.answering import answer, load
from omni.data import scenes
from omni.evaluation import Asked, evaluate_scenes, generate_answers, score, uses_the_picture, wilson_interval

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "omni_tiny"
KINDS = ("shape", "color", "count", "exists")


@pytest.fixture(scope="module")
def shipped():  # type: ignore[no-untyped-def]
    return load(CHECKPOINT)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # from Newcombe, "Two-sided confidence intervals for the single proportion" (1998)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_interval_bounds_are_where_the_score_test_rejects() -> None:
    for right, n in ((3, 10), (50, 60), (200, 201)):
        for bound in wilson_interval(right, n):
            assert abs(right / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(1.96, abs=1e-6)


def test_scores_by_kind_with_the_best_constant_answer() -> None:
    asked = [Asked("color", "?", "red", "red"), Asked("color", "?", "red", "blue"), Asked("color", "?", "blue", "blue")]
    found = {s.kind: s for s in score([*asked, Asked("exists", "?", "yes", "Yes")])}
    assert (found["color"].n, found["color"].accuracy) == (3, pytest.approx(2 / 3))
    assert (found["color"].constant_answer, found["color"].constant) == ("red", pytest.approx(2 / 3))
    assert found["exists"].accuracy == 0.0  # to the last character


def test_captions_are_scored_object_by_object() -> None:
    scene = scenes.sample_scene(3, "test", min_objects=3, max_objects=3)
    whole = scenes.caption(scene)
    one_wrong = whole.replace(f"{scene.objects[0].color} {scene.objects[0].shape}", "plaid circle", 1)
    found = {s.kind: s for s in score([Asked("caption", "?", whole, one_wrong)])}
    assert found["caption"].accuracy == 0.0
    assert (found["caption_objects"].n, found["caption_objects"].accuracy) == (3, pytest.approx(2 / 3))


def test_the_shipped_checkpoint_sees(shipped) -> None:  # type: ignore[no-untyped-def]
    real, asked = evaluate_scenes(*shipped, pictures=30, first=500_000, kinds=KINDS)
    blank, _ = evaluate_scenes(*shipped, pictures=30, first=500_000, kinds=KINDS, sight="blank")
    assert {item.kind for item in asked} == set(KINDS)
    assert sum(s.accuracy for s in real.scores) / len(KINDS) > 0.8
    assert blank.score("shape").accuracy < 0.4
    assert blank.score("color").accuracy < 0.4
    assert uses_the_picture([real, blank])
    assert not uses_the_picture([real, real.model_copy(update={"sight": "blank"})])


def test_a_batch_is_answered_as_each_question_alone(shipped) -> None:  # type: ignore[no-untyped-def]
    prompts = []
    for seed in range(6):
        scene = scenes.sample_scene(seed, "test")
        question = scenes.questions(scene, seed, 1)[0]
        prompts.append((question.text, [scenes.render(scene)] * (1 + seed % 2)))
    together = generate_answers(*shipped, prompts)
    assert together == [answer(*shipped, pictures, question).answer for question, pictures in prompts]
