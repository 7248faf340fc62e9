"""Compare contestants: all of a race run in one process, and take turns.

The speed of a machine drifts by a third within minutes, so runs at different times cannot be compared. Here, each round
calls every contestant once, in a new random order. The results are the median over the rounds and the ratio of two medians.
The 95 % interval of a ratio comes from drawing rounds with replacement (Efron's bootstrap). Whole rounds are drawn, because
the contestants of one round ran on the machine in the same state.

A contestant that cannot run stays in the table, with the reason.
"""

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[], Any]
Clock = Callable[[], float]


class Unavailable(Exception):
    """The contestant cannot run on this machine, or is left out. The message says why."""


@dataclass(frozen=True)
class Part:
    """A part of the work that every contestant has to do. The ceiling is the sum of the parts.

    Attributes:
        name: its name in tables.
        times: how often it occurs in one call.
        flops: its floating-point operations.
    """

    name: str
    times: int
    flops: int


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a race.

    Attributes:
        name: its name in tables.
        build: returns the function that is timed. Raises if it cannot run here.
        ours: whether it is omni's and not a peer's.
        check: takes the result of the first call, returns its difference from the right one. Raises if that is too large.
        whole: whether it does all parts of the work. If not, it has no share of the ceiling.
        part: the part of the work that it does, if it only contributes to the ceiling.
    """

    name: str
    build: Callable[[], Call]
    ours: bool = False
    check: Callable[[Any], float] | None = None
    whole: bool = True
    part: Part | None = None


@dataclass(frozen=True)
class Race:
    """Contestants that do the same work.

    Attributes:
        title: the title of its table.
        contestants: the contestants, omni's and peers'.
        items: number of `unit` that one call handles. 0 if the result is a time, as in the job "imports".
        unit: what is counted, such as "img".
        sample: seconds of one measurement, at least. A faster contestant is called several times for it. 0 for
            contestants that start a process: they are called once.
    """

    title: str
    contestants: Sequence[Contestant]
    items: int = 0
    unit: str = ""
    sample: float = 0.05


@dataclass(frozen=True)
class Result:
    """The measurements of one contestant.

    Attributes:
        contestant: the contestant.
        seconds: seconds of one call, in each round. Empty if it did not run.
        difference: the result of `Contestant.check`.
        reason: why it did not run.
        expected: whether it ran or raised `Unavailable`. Any other error is unexpected.
    """

    contestant: Contestant
    seconds: tuple[float, ...] = ()
    difference: float | None = None
    reason: str = ""
    expected: bool = True

    @property
    def median(self) -> float:
        """Seconds of one call."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of the seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcome:
    """The results of a race."""

    race: Race
    results: Sequence[Result]

    @property
    def entrants(self) -> list[Result]:
        """The contestants without those for the ceiling, the fastest first, and last those that did not run."""
        entrants = [result for result in self.results if result.contestant.part is None]
        return sorted(entrants, key=lambda result: result.median if result.seconds else float("inf"))

    @property
    def fastest_peer(self) -> Result | None:
        """The peer that omni is compared with."""
        return next((each for each in self.entrants if each.seconds and not each.contestant.ours), None)

    @property
    def parts(self) -> dict[Part, Result] | None:
        """Each part of the work, with its fastest way. None if there are no parts, or if one could not be measured."""
        best: dict[Part, Result] = {}
        wanted = {each.contestant.part for each in self.results if each.contestant.part}
        for each in self.results:
            part = each.contestant.part
            if part and each.seconds and (part not in best or each.median < best[part].median):
                best[part] = each
        return best if best and best.keys() == wanted else None

    @property
    def ceiling(self) -> float | None:
        """The seconds of a call that does nothing but the parts."""
        parts = self.parts
        return sum(part.times * result.median for part, result in parts.items()) if parts else None

    def share(self, result: Result) -> float | None:
        """The share of the ceiling: the time of the parts over the time of the contestant."""
        ceiling = self.ceiling
        return ceiling / result.median if ceiling and result.seconds and result.contestant.whole else None

    def ratio(self, result: Result) -> Ratio | None:
        """The rate as a multiple of the fastest peer's. In a race for time, the time as a multiple of its time."""
        peer = self.fastest_peer
        if peer is None or not result.seconds:
            return None
        above, below = (peer, result) if self.race.items else (result, peer)
        return compare(above.seconds, below.seconds)


def compare(above: Sequence[float], below: Sequence[float], resamples: int = 2000) -> Ratio:
    """The ratio of two medians over the same rounds, float[R] each."""
    rows = np.random.default_rng(0).integers(len(above), size=(resamples, len(above)))
    ratios = np.median(np.asarray(above)[rows], axis=1) / np.median(np.asarray(below)[rows], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


def run(race: Race, rounds: int, clock: Clock = time.perf_counter, order: random.Random | None = None) -> Outcome:
    """Run a race: build and warm up every contestant, then `rounds` rounds in which they take turns."""
    order = order or random.Random(0)
    entries = [_Entry(contestant, race.sample, clock) for contestant in race.contestants]
    running = [entry for entry in entries if entry.call]
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()  # existing objects are not scanned again
    gc.disable()  # as timeit does, or garbage collection would hit contestants at random
    try:
        for _ in range(rounds):
            gc.collect()
            for entry in order.sample(running, len(running)):
                entry.measure(clock)
    finally:
        gc.enable()
        if not frozen:  # or what the caller froze would be scanned from here on
            gc.unfreeze()
    return Outcome(race, [entry.result() for entry in entries])


class _Entry:
    """A contestant that is built and warmed up."""

    def __init__(self, contestant: Contestant, sample: float, clock: Clock) -> None:
        self.contestant, self.seconds = contestant, list[float]()
        self.call: Call | None = None
        self.calls, self.difference, self.reason, self.expected = 1, None, "", True
        try:
            call = contestant.build()
            output = call()  # the first call compiles
            self.difference = contestant.check(output) if contestant.check else None
            if sample:
                start = clock()
                call()
                self.calls = max(1, round(sample / max(clock() - start, 1e-9)))
        except Exception as error:  # the others still run, and the table tells the reason
            self.expected = isinstance(error, Unavailable)
            first = (str(error).strip() or "no message").splitlines()[0]
            self.reason = first if self.expected else f"{type(error).__name__}: {first}"
        else:
            self.call = call

    def measure(self, clock: Clock) -> None:
        assert self.call is not None
        if self.calls > 1:
            self.call()  # the processor's caches hold the data of the previous contestant
        start = clock()
        for _ in range(self.calls):
            self.call()
        self.seconds.append((clock() - start) / self.calls)

    def result(self) -> Result:
        return Result(self.contestant, tuple(self.seconds), self.difference, self.reason, self.expected)
