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
    """Notes when `generate` has the first token of an answer, and hands everything on to another streamer.

    Args:
        streamer: one of transformers' streamers, or None.
    """

    def __init__(self, streamer: Any = None) -> None:
        self.streamer, self.puts, self.first = streamer, 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then each token."""
        self.puts += 1
        if self.puts == 2:
            self.first = time.perf_counter()
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        """Note that the answer is whole."""
        if self.streamer is not None:
            self.streamer.end()

    def seconds(self, start: float, prepared: float, encoded: float, ended: float) -> dict[str, float]:
        """The durations for `Answer.seconds`, from the times at which preparing began, and each step ended."""
        return {
            "preparing": round(prepared - start, 4),
            "encoding": round(encoded - prepared, 4),
            "reading": round(self.first - encoded, 4),
            "writing": round(ended - self.first, 4),
        }


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
