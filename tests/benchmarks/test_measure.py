"""Turns, medians, ratios and ceilings of contestants that take as long as they are told, by a clock that they move."""

import gc
import io
import json
import random
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from rich.console import Console

from benchmarks import tables
from benchmarks.measure import Call, Contestant, Outcome, Part, Race, Unavailable, compare, run


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contestant(self, name: str, seconds: Iterable[float] | float, **options: Any) -> Contestant:
        """One whose calls take these seconds; the first is what it is built and checked with."""
        each = iter(seconds) if isinstance(seconds, Iterable) else forever(seconds)

        def call() -> str:
            self.calls.append(name)
            self.now += next(each)
            return name

        return Contestant(name, lambda: call, **options)


def forever(value: float) -> Iterator[float]:
    while True:
        yield value


def broken(error: Exception) -> Call:
    raise error


def race(*contestants: Contestant, **options: Any) -> Race:
    return Race("a race", contestants, **{"sample": 0, **options})


def by_name(outcome: Outcome) -> dict[str, Any]:
    return {result.contestant.name: result for result in outcome.results}


# --- turns ------------------------------------------------------------------------------------------------------------


def test_every_round_calls_each_once_in_an_order_of_its_own() -> None:
    clock = Clock()
    run(race(*(clock.contestant(name, 1) for name in "abcd")), rounds=20, clock=clock)
    assert clock.calls[:4] == list("abcd")  # the first calls, which are not counted
    rounds = [clock.calls[start : start + 4] for start in range(4, 84, 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 5
    assert {turn[0] for turn in rounds} == {*"abcd"}


def test_the_order_is_the_same_in_every_run_unless_another_is_asked_for() -> None:
    def calls(**options: Any) -> list[str]:
        clock = Clock()
        run(race(*(clock.contestant(name, 1) for name in "abcd")), rounds=10, clock=clock, **options)
        return clock.calls

    assert calls() == calls()
    assert calls() != calls(order=random.Random(1))


def test_first_calls_are_not_counted() -> None:
    clock = Clock()
    outcome = run(race(clock.contestant("compiles", [100, 1, 2, 9])), rounds=3, clock=clock)
    (result,) = outcome.results
    assert result.seconds == (1, 2, 9)
    assert result.median == 2
    assert result.quartiles == (1.5, 5.5)


def test_quick_ones_are_called_several_times_in_a_row_and_slow_ones_once() -> None:
    clock = Clock()
    contestants = clock.contestant("quick", 0.01), clock.contestant("slow", 3)
    outcome = run(race(*contestants, sample=0.05), rounds=2, clock=clock)
    # to be built, to see how quick it is, then one to warm up and five measured in each round
    assert clock.calls.count("quick") == 2 + 2 * (1 + 5)
    assert clock.calls.count("slow") == 2 + 2
    assert by_name(outcome)["quick"].seconds == pytest.approx((0.01, 0.01))
    assert by_name(outcome)["slow"].seconds == pytest.approx((3, 3))


def test_garbage_is_collected_between_rounds_only() -> None:
    seen = []
    contestant = Contestant("a", lambda: lambda: seen.append(gc.isenabled()))
    run(race(contestant), rounds=2)
    assert seen == [True, False, False]
    assert gc.isenabled()


def test_an_error_in_a_round_is_raised_and_garbage_is_collected_again() -> None:
    calls = iter([1])
    with pytest.raises(StopIteration):
        run(race(Contestant("a", lambda: lambda: next(calls))), rounds=1)
    assert gc.isenabled()


# --- who does not run -------------------------------------------------------------------------------------------------


def test_a_contestant_that_cannot_run_is_listed_with_the_reason() -> None:
    clock = Clock()
    outcome = run(
        race(
            clock.contestant("runs", 1),
            Contestant("missing", lambda: broken(Unavailable("it is not installed."))),
            Contestant("broken", lambda: broken(KeyError("key"))),
            Contestant("breaks", lambda: lambda: broken(RuntimeError("no compiler\nand a long explanation"))),
        ),
        rounds=2,
        clock=clock,
    )
    results = by_name(outcome)
    assert results["runs"].seconds == (1, 1)
    assert (results["missing"].reason, results["missing"].expected) == ("it is not installed.", True)
    assert (results["broken"].reason, results["broken"].expected) == ("KeyError: 'key'", False)
    assert (results["breaks"].reason, results["breaks"].expected) == ("RuntimeError: no compiler", False)
    assert outcome.entrants[0] is results["runs"]
    for name in ("missing", "broken", "breaks"):
        assert results[name].seconds == ()
        assert outcome.ratio(results[name]) is None


def test_a_contestant_with_a_wrong_result_does_not_run() -> None:
    clock = Clock()
    outcome = run(
        race(
            clock.contestant("right", 1, check=lambda output: 0.25),
            clock.contestant("wrong", 1, check=lambda output: broken(ValueError(f"{output} is off by 3."))),
        ),
        rounds=1,
        clock=clock,
    )
    results = by_name(outcome)
    assert results["right"].difference == 0.25
    assert results["wrong"].reason == "ValueError: wrong is off by 3."
    assert clock.calls.count("wrong") == 1


# --- ratios -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("items", "expected"), [(10, 1.5), (0, 1 / 1.5)])
def test_ours_are_compared_with_the_fastest_peer(items: int, expected: float) -> None:
    clock = Clock()
    contestants = (
        clock.contestant("fast peer", 3),
        clock.contestant("slow peer", 4),
        clock.contestant("ours", 2, ours=True),
        clock.contestant("part", 1, part=Part("part", 1, 1)),
    )
    outcome = run(race(*contestants, items=items, unit="img"), rounds=3, clock=clock)
    assert outcome.fastest_peer is not None
    assert outcome.fastest_peer.contestant.name == "fast peer"
    ratio = outcome.ratio(by_name(outcome)["ours"])
    assert ratio is not None
    assert ratio.value == pytest.approx(expected)


def test_a_ratio_is_that_of_medians_and_lies_in_its_interval() -> None:
    ratio = compare([4, 6, 100], [1, 2, 3])
    assert ratio.value == 3
    assert ratio.low <= 3 <= ratio.high
    assert ratio.low < ratio.high


def test_what_slows_a_whole_round_down_does_not_widen_the_interval() -> None:
    machine = [1, 1.5, 3, 1.1, 1, 2, 1.7]
    ratio = compare([2 * slow for slow in machine], machine)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


# --- the ceiling ------------------------------------------------------------------------------------------------------


def parts(clock: Clock) -> list[Contestant]:
    qkv, output = Part("qkv", 4, 300), Part("output", 1, 100)
    return [
        clock.contestant("qkv, one way", 3, part=qkv),
        clock.contestant("qkv, another", 2, part=qkv),
        clock.contestant("output, one way", 1, part=output),
    ]


def test_the_ceiling_is_every_part_in_its_fastest_way_as_often_as_it_occurs() -> None:
    clock = Clock()
    contestants = (
        clock.contestant("peer", 18),
        clock.contestant("partial", 6, ours=True, whole=False),
        clock.contestant("ours", 12, ours=True),
    )
    outcome = run(race(*contestants, *parts(clock), items=9, unit="img"), rounds=3, clock=clock)
    assert outcome.ceiling == 4 * 2 + 1
    results = by_name(outcome)
    assert [outcome.share(results[name]) for name in ("peer", "ours", "partial")] == [0.5, 0.75, None]
    assert [each.contestant.name for each in outcome.entrants] == ["partial", "ours", "peer"]
    ceiling = tables.document(outcome)["ceiling"]
    assert ceiling == {"seconds": 9, "gflops": pytest.approx(1300 / 9 / 1e9), "rate": 1}


def test_without_all_of_its_parts_there_is_no_ceiling() -> None:
    clock = Clock()
    lacking = Contestant("scores", lambda: broken(Unavailable("no such product.")), part=Part("scores", 1, 1))
    outcome = run(race(clock.contestant("peer", 1), *parts(clock), lacking), rounds=1, clock=clock)
    assert outcome.ceiling is None
    assert outcome.share(by_name(outcome)["peer"]) is None


# --- what is printed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [0, 8])
def test_table_and_document_list_every_contestant(items: int) -> None:
    clock = Clock()
    contestants = (
        clock.contestant("peer", [1, 2, 3, 4], check=lambda output: 1e-6),
        clock.contestant("ours [fast]", [1, 1, 1, 1], ours=True),
        Contestant("missing", lambda: broken(Unavailable("it is not installed [here]."))),
        Contestant("missing too", lambda: broken(Unavailable("it is not installed [here]."))),
    )
    outcome = run(race(*contestants, *parts(clock), items=items, unit="img"), rounds=3, clock=clock)
    console = Console(width=200, file=(output := io.StringIO()))
    console.print(tables.table("job", outcome))
    text = output.getvalue()
    for shown in ("job: a race", "peer", "ours [fast]", "missing; missing too: it is not installed [here].", "Ceiling"):
        assert shown in text
    document = json.loads(json.dumps(tables.document(outcome)))
    entries = {entry["name"]: entry for entry in document["contestants"]}
    assert document["fastest_peer"] == "peer"
    assert len(entries) == len(contestants) + 3
    assert entries["peer"]["seconds"] == [2, 3, 4]
    assert entries["peer"]["difference"] == 1e-6
    assert entries["ours [fast]"]["ratio"] == pytest.approx(3 if items else 1 / 3)
    assert ("rate" in entries["peer"]) == bool(items)
    assert entries["missing"]["reason"] == "it is not installed [here]."
