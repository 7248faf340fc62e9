"""Scores are counted right, and so are their intervals, what guessing gets, and the verdict of the sight test."""

import math
from statistics import NormalDist

import pytest
from scipy.stats import binomtest

from omni.evaluation import Asked
from omni.evaluation.scores import Evaluation, Parts, Sight, score, sight_test, uses_the_items, wilson_interval


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


def test_answers_are_scored_part_by_part_where_that_is_asked_for() -> None:
    def right_words(expected: str, answer: str) -> list[bool]:
        return [word in answer.split() for word in expected.split()]

    parts = Parts(of="list", kind="list_words", right=right_words)
    asked = [Asked("list", "?", "a b c", "a c"), Asked("color", "?", "red", "red"), Asked("list", "?", "d", "d")]
    found = Evaluation.of(asked, parts=parts)
    assert [(s.kind, s.n, s.accuracy) for s in found.scores] == [
        ("list", 2, 0.5),
        ("list_words", 4, 0.75),
        ("color", 1, 1.0),
    ]
    words = found.score("list_words")
    assert (words.constant, words.constant_answer) == (0.0, "-")  # nobody answers with parts
    assert (found.overall().n, found.overall().accuracy) == (3, pytest.approx(2 / 3))  # an answer is one question
    assert [s.kind for s in score(asked)] == ["list", "color"]


def test_answers_without_parts_have_no_row_of_parts() -> None:
    found = Evaluation.of([Asked("list", "?", "", "a")], parts=Parts("list", "list_words", lambda one, other: []))
    assert [s.kind for s in found.scores] == ["list"]


def answered(right: int, n: int, kind: str = "color") -> list[Asked]:
    return [Asked(kind, "?", "red", "red" if place < right else "blue") for place in range(n)]


def test_overall_counts_every_question_once() -> None:
    found = Evaluation.of([*answered(3, 10), *answered(5, 30, "shape")]).overall()
    assert (found.n, found.accuracy) == (40, 8 / 40)
    assert (found.low, found.high) == wilson_interval(8, 40)
    assert found.constant == 1.0


def test_the_sight_test_is_passed_by_what_the_pictures_alone_explain() -> None:
    def passes(real: int, blank: int, swapped: int) -> bool:
        shown: dict[Sight, int] = {"real": real, "blank": blank, "swapped": swapped}
        evaluations = [Evaluation.of(answered(n, 100), s) for s, n in shown.items()]
        test = sight_test(evaluations, {"noise": "there was none"})
        assert test.passed == uses_the_items(evaluations)
        assert list(test.overall) == ["real", "blank", "swapped"]
        assert list(test.scores) == ["blank", "swapped"]
        return test.passed

    assert passes(90, 20, 25)
    assert not passes(90, 20, 90)
    assert not passes(55, 50, 50)  # the intervals overlap
