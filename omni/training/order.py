"""The order of training examples: rows that are read together stay near each other, and sources mix by weight.

A Parquet file is read in blocks of rows. If rows came in random order, a block would be read for each row. So blocks
are shuffled and dealt to lanes, one for each worker of each process, and rows are shuffled within a few blocks of a
lane. A batch comes from one lane, so a worker reads only its own blocks.

The order follows from the seed, the epoch and the numbers of workers and processes. A resumed run computes it again and
continues in the middle of it.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count, islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from omni.data.arrow import WINDOW
from omni.training.sections import Mixture


class Mixed(Dataset[Any]):
    """The examples of several sources, one source after the other. `Order` draws from them by weight.

    Args:
        parts: the sources.
        weights: relative frequency of each source.
    """

    def __init__(self, parts: Sequence[Any], weights: Sequence[float]) -> None:
        self.parts, self.weights = parts, weights
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        part, place = self._find(index)
        return part[place]

    def caption(self, index: int) -> str:
        """See `ManifestCaptions`."""
        part, place = self._find(index)
        return str(part.caption(place))

    def transcript(self, index: int) -> str:
        """See `ManifestSayings`."""
        part, place = self._find(index)
        return str(part.transcript(place))

    def label(self, index: int) -> str:
        """See `ManifestClasses`."""
        part, place = self._find(index)
        return str(part.label(place))

    def _find(self, index: int) -> tuple[Any, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


class Order(Sampler[int]):
    """The order of an epoch. Every example comes once; from `Mixed`, as many as there are, drawn by weight.

    A source that is used up before the end of an epoch starts again, in another order.

    Args:
        examples: a source with `blocks`, or `Mixed` of any sources.
        batch: examples in one batch of one process.
        lanes: number of processes times workers per process.
        seed: seed of the run.

    Attributes:
        epoch: the next epoch, counted from 0.
    """

    def __init__(self, examples: Any, batch: int, lanes: int, seed: int) -> None:
        self.parts = examples.parts if isinstance(examples, Mixed) else [examples]
        self.weights = np.asarray(examples.weights if isinstance(examples, Mixed) else [1.0])
        self.batch, self.lanes, self.seed, self.epoch = batch, lanes, seed, 0
        sizes = [len(part) for part in self.parts]
        self._length, self._firsts = sum(sizes), np.cumsum([0, *sizes])

    @staticmethod
    def wanted(examples: Any) -> bool:
        """Whether these examples need such an order: they are mixed, or read in blocks."""
        return isinstance(examples, Mixed) or getattr(examples, "blocks", None) is not None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        lanes = [self._lane(epoch, lane) for lane in range(self.lanes)]
        if len(self.parts) > 1:
            ends = [self._length * (lane + 1) // self.lanes for lane in range(self.lanes)]
            lanes = [islice(lane, end - start) for lane, start, end in zip(lanes, [0, *ends], ends, strict=False)]
        return _in_turns(lanes, self.batch)

    def _lane(self, epoch: int, lane: int) -> Iterator[int]:
        """The examples of a lane; an endless iterator if there are several sources."""
        sources = [self._source(number, epoch, lane) for number in range(len(self.parts))]
        if len(sources) == 1:
            yield from sources[0]
            return
        random, shares = self._random(epoch, lane), np.cumsum(self.weights / self.weights.sum())
        while True:
            drawn = np.searchsorted(shares, random.random(256), side="right")
            yield from (next(sources[min(number, len(sources) - 1)]) for number in drawn)

    def _source(self, number: int, epoch: int, lane: int) -> Iterator[int]:
        """The examples of one source in a lane; repeated without end if there are several sources."""
        part, first = self.parts[number], int(self._firsts[number])
        blocks = getattr(part, "blocks", None)
        sizes = None if blocks is None else np.asarray(blocks)  # None: each row is read alone
        for times in count():
            dealt = self._random(epoch, number, times).permutation(len(part) if sizes is None else len(sizes))
            own = dealt[lane :: self.lanes].copy()  # `dealt` is the same in all lanes
            if not len(own) and len(self.parts) > 1:  # fewer blocks than lanes
                own = dealt
            if sizes is None:
                yield from (first + own).tolist()
            else:
                starts, random = np.cumsum(sizes) - sizes, self._random(epoch, number, times, lane)
                for place in range(0, len(own), WINDOW):
                    rows = [starts[block] + np.arange(sizes[block]) for block in own[place : place + WINDOW]]
                    yield from (first + random.permutation(np.concatenate(rows))).tolist()
            if len(self.parts) == 1:
                return

    def _random(self, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *place])


def _in_turns(lanes: Sequence[Iterator[int]], batch: int) -> Iterator[int]:
    """A batch from each lane in turn. The remainders of all lanes come last."""
    left, waiting = list[int](), list(lanes)
    while waiting:
        for lane in list(waiting):
            taken = list(islice(lane, batch))
            if len(taken) == batch:
                yield from taken
            else:
                left += taken
                waiting.remove(lane)
    yield from left


def mix(data: Any, make: Callable[[Any], Any]) -> Any:
    """The examples that `make` makes of the data, or `Mixed` of those of each source of a mixture."""
    if not isinstance(data, Mixture):
        return make(data)
    return Mixed([make(part.data) for part in data.sources], [part.weight for part in data.sources])
