"""Scores are counted right, and so are their intervals, what guessing gets, and the verdict of the sight test."""

import math
from statistics import NormalDist

import pytest
from scipy.stats import binomtest

from omni import scenes
from omni.evaluation import Asked, Evaluation, score, sight_test, uses_the_picture, wilson_interval
from omni.evaluation.scores import overall


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # from Newcombe, "Two-sided confidence intervals for the single proportion" (1998)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 1), (3, 10), (10, 10), (499, 500), (50, 60)])
def test_interval_equals_that_of_scipy(right: int, n: int) -> None:
    exact = wilson_interval(right, n, NormalDist().inv_cdf(0.975))
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert exact == pytest.approx((theirs.low, theirs.high), abs=1e-12)


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


def test_captions_of_scenes_are_scored_object_by_object() -> None:
    scene = scenes.sample_scene(3, "test", min_objects=3, max_objects=3)
    whole = scenes.caption(scene)
    one_wrong = whole.replace(f"{scene.objects[0].color} {scene.objects[0].shape}", "plaid circle", 1)
    asked = [Asked("caption", "?", whole, one_wrong)]
    found = {s.kind: s for s in score(asked)}
    assert found["caption"].accuracy == 0.0
    assert (found["caption_objects"].n, found["caption_objects"].accuracy) == (3, pytest.approx(2 / 3))
    assert [s.kind for s in score(asked, scene_captions=False)] == ["caption"]
    assert overall(score(asked)).n == 1  # a caption is one question


def answered(right: int, n: int, kind: str = "color") -> list[Asked]:
    return [Asked(kind, "?", "red", "red" if place < right else "blue") for place in range(n)]


def test_overall_counts_every_question_once() -> None:
    found = overall(score([*answered(3, 10), *answered(5, 30, "shape")]))
    assert (found.n, found.accuracy) == (40, 8 / 40)
    assert (found.low, found.high) == wilson_interval(8, 40)
    assert found.constant == 1.0


def test_the_sight_test_is_passed_by_what_the_pictures_alone_explain() -> None:
    def passes(real: int, blank: int, swapped: int) -> bool:
        shown = {"real": real, "blank": blank, "swapped": swapped}
        evaluations = [Evaluation(sight=s, scores=score(answered(n, 100))) for s, n in shown.items()]
        test = sight_test(evaluations, {"noise": "there was none"})
        assert test.passed == uses_the_picture(evaluations)
        assert list(test.overall) == ["real", "blank", "swapped"]
        assert list(test.scores) == ["blank", "swapped"]
        return test.passed

    assert passes(90, 20, 25)
    assert not passes(90, 20, 90)
    assert not passes(55, 50, 50)  # the intervals overlap
