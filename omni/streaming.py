"""An answer while it is written: the time of its first token, and its text after each token."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from omni.questions import Answer


class Clock(BaseStreamer):
    """Measures the time of each step of an answer, and passes what `generate` writes to another streamer.

    "reading" ends with the first token. `note` marks the ends of the other steps.

    Args:
        streamer: one of transformers' streamers, or None.

    Attributes:
        seconds: the time of each step by name.
    """

    def __init__(self, streamer: Any = None) -> None:
        self.streamer, self.puts, self._last = streamer, 0, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def note(self, part: str) -> None:
        """Mark the end of a step. Its time is that since the last mark."""
        now = time.perf_counter()
        self.seconds[part], self._last = round(now - self._last, 4), now

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token, int64[1]."""
        self.puts += 1
        if self.puts == 2:
            self.note("reading")
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Tell the streamer that the answer is complete."""
        if self.streamer is not None:
            self.streamer.end()


class _Tokens(BaseStreamer):
    """Passes tokens to another thread through a queue: the prompt, then each token, then None."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self.wanted = True

    def put(self, value: torch.Tensor) -> None:
        if not self.wanted:
            raise InterruptedError("Nobody listens any more.")
        self.queue.put(value.flatten().tolist())

    def end(self) -> None:
        self.queue.put(None)


def stream(
    ask: Callable[[BaseStreamer], Answer], decode: Callable[[list[int]], str], question: str, checkpoint: str
) -> Iterator[Answer]:
    """Ask, and yield the answer while it is written. If the iterator is closed, writing stops.

    Args:
        ask: asks the question, and passes the streamer to `generate`.
        decode: turns tokens into text.
        question, checkpoint: copied into each answer.

    Yields:
        The beginning of the answer each time it has grown, with `complete` False and no `seconds`; finally the answer that
        `ask` returns.
    """
    tokens, written, said = _Tokens(), list[int](), ""
    with ThreadPoolExecutor(1) as writer:
        asked = writer.submit(ask, tokens)
        asked.add_done_callback(lambda _: tokens.end())  # also if nothing is generated
        try:
            given = iter(tokens.queue.get, None)
            tokens_read = len(next(given, ()))
            for token in given:
                written += token
                text = decode(written).rstrip("\ufffd")  # a token may be only a part of a character
                if text != said:
                    said = text
                    yield Answer(
                        answer=text,
                        question=question,
                        checkpoint=checkpoint,
                        complete=False,
                        tokens_read=tokens_read,
                        tokens_written=len(written),
                        seconds={},
                    )
        finally:
            tokens.wanted = False
        yield asked.result()
