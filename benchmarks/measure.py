"""How contestants are compared: all of a race in one process, taking turns.

The speed of a machine drifts by a third within minutes, so what ran at different times cannot be compared. Here every
round calls each contestant once, in an order drawn anew. Reported are the median over the rounds and the ratio of two
medians; its 95 % interval comes from drawing rounds with replacement (Efron's bootstrap), whole rounds, because
contestants of one round have met the same machine.

A contestant that cannot run here is kept, with the reason.
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
    """A contestant that cannot run on this machine, or is left out; the message says why."""


@dataclass(frozen=True)
class Part:
    """A piece of work that every contestant has to do; the ceiling is made of such.

    Attributes:
        times: how often it occurs in one call.
        flops: floating-point operations of one.
    """

    name: str
    times: int
    flops: int


@dataclass(frozen=True)
class Contestant:
    """One way of doing what a race is about.

    Attributes:
        build: makes what is timed, a function without arguments; raises if it cannot run here.
        ours: omni's, and not a peer's.
        check: of the first call's result, how far off it is; raises if that is too far.
        whole: whether it does all parts of the work; if not, its share of the ceiling would mean nothing.
        part: for what does this part of the work only, as a contribution to the ceiling.
    """

    name: str
    build: Callable[[], Call]
    ours: bool = False
    check: Callable[[Any], float] | None = None
    whole: bool = True
    part: Part | None = None


@dataclass(frozen=True)
class Race:
    """Contestants that do the same.

    Attributes:
        items: how many of `unit` one call handles; 0 where time itself is the result, as with starting up.
        sample: seconds; a contestant that is quicker is called several times in a row for one measurement. 0 for what
            starts a process: once is enough, and nothing of it stays warm.
    """

    title: str
    contestants: Sequence[Contestant]
    items: int = 0
    unit: str = ""
    sample: float = 0.05


@dataclass(frozen=True)
class Result:
    """What was measured of one contestant.

    Attributes:
        seconds: of one call, in each round; empty if it did not run.
        difference: what `Contestant.check` found.
        reason: why it did not run.
        expected: whether that was `Unavailable`, rather than an error that nobody thought of.
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
        """Seconds that a quarter and three quarters of the rounds stayed below."""
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
    """A race that was run."""

    race: Race
    results: Sequence[Result]

    @property
    def entrants(self) -> list[Result]:
        """The contestants themselves, the fastest first, and those that did not run last."""
        entrants = [result for result in self.results if result.contestant.part is None]
        return sorted(entrants, key=lambda result: result.median if result.seconds else float("inf"))

    @property
    def fastest_peer(self) -> Result | None:
        """What ours are compared with."""
        return next((each for each in self.entrants if each.seconds and not each.contestant.ours), None)

    @property
    def parts(self) -> dict[Part, Result] | None:
        """Each part of the work in the fastest of its ways; None without any, or if one could not be measured."""
        best: dict[Part, Result] = {}
        wanted = {each.contestant.part for each in self.results if each.contestant.part}
        for each in self.results:
            part = each.contestant.part
            if part and each.seconds and (part not in best or each.median < best[part].median):
                best[part] = each
        return best if best and best.keys() == wanted else None

    @property
    def ceiling(self) -> float | None:
        """Seconds of a call that would do nothing but its parts."""
        parts = self.parts
        return sum(part.times * result.median for part, result in parts.items()) if parts else None

    def share(self, result: Result) -> float | None:
        """Of the ceiling: the time of the parts over the time of the whole."""
        ceiling = self.ceiling
        return ceiling / result.median if ceiling and result.seconds and result.contestant.whole else None

    def ratio(self, result: Result) -> Ratio | None:
        """Against the fastest peer: how many times the rate; in a race for time, how many times the time."""
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
    gc.collect()
    gc.freeze()  # what is there already will not be looked through again
    gc.disable()  # as timeit does: whose turn it is when garbage is collected would be chance
    try:
        for _ in range(rounds):
            gc.collect()
            for entry in order.sample(running, len(running)):
                entry.measure(clock)
    finally:
        gc.enable()
        gc.unfreeze()
    return Outcome(race, [entry.result() for entry in entries])


class _Entry:
    """A contestant on the track."""

    def __init__(self, contestant: Contestant, sample: float, clock: Clock) -> None:
        self.contestant, self.seconds = contestant, list[float]()
        self.call: Call | None = None
        self.calls, self.difference, self.reason, self.expected = 1, None, "", True
        try:
            call = contestant.build()
            output = call()  # also what compiles
            self.difference = contestant.check(output) if contestant.check else None
            if sample:
                start = clock()
                call()
                self.calls = max(1, round(sample / max(clock() - start, 1e-9)))
        except Exception as error:  # whatever it is, the others shall run, and the reader shall know
            self.expected = isinstance(error, Unavailable)
            first = (str(error).strip() or "no message").splitlines()[0]
            self.reason = first if self.expected else f"{type(error).__name__}: {first}"
        else:
            self.call = call

    def measure(self, clock: Clock) -> None:
        assert self.call is not None
        if self.calls > 1:
            self.call()  # the contestant before has filled the processor's caches with its own
        start = clock()
        for _ in range(self.calls):
            self.call()
        self.seconds.append((clock() - start) / self.calls)

    def result(self) -> Result:
        return Result(self.contestant, tuple(self.seconds), self.difference, self.reason, self.expected)
