"""An answer while it is written: when its first token comes, and what there is of it after each."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from omni.questions import Answer


class Clock(BaseStreamer):
    """Notes when each part of an answer is done, and hands what `generate` writes on to another streamer.

    "reading" is done when the first token is there; of the other parts `note` is told.

    Args:
        streamer: one of transformers' streamers, or None.
    """

    def __init__(self, streamer: Any = None) -> None:
        self.streamer, self.puts, self._last = streamer, 0, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def note(self, part: str) -> None:
        """A part is done: it took the time since the one before."""
        now = time.perf_counter()
        self.seconds[part], self._last = round(now - self._last, 4), now

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        self.puts += 1
        if self.puts == 2:
            self.note("reading")
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Note that the answer is whole."""
        if self.streamer is not None:
            self.streamer.end()


class _Tokens(BaseStreamer):
    """Brings tokens from the thread that writes to the one that waits: the prompt's, then one by one, then None."""

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
    """Ask, and get the answer while it is written. Whoever stops listening stops the writing.

    Args:
        ask: asks the question, and gives the streamer to `generate`.
        decode: tokens to text.
        question, checkpoint: of the answer.

    Yields:
        What there is of the answer whenever it has grown, with `complete` False and no `seconds`; at last what `ask`
        returns.
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
                text = decode(written).rstrip("\ufffd")  # a token may be a part of a letter
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
