"""An answer while it is written: tokens become text, and text is sent as soon as it is final.

logits -> probabilities recorded, bias and penalties added (`Scores`) -> token -> text (`Writing`) -> `Piece`, ..., `End`
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers.decoders import DecodeStream
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from omni.knowing.familiarity import Familiar

from .fields import RequestError
from .requests import Request


@dataclass(frozen=True)
class Token:
    """A token that was written.

    Attributes:
        text: its text alone.
        logprob: natural logarithm of its probability, before temperature, bias and penalties.
        likely: the most likely tokens at its place, each with its logprob.
    """

    text: str
    logprob: float
    likely: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Piece:
    """A new piece of an answer. It has its tokens only if the client asked for them."""

    text: str
    tokens: Sequence[Token] = ()


@dataclass(frozen=True)
class End:
    """The end of an answer; `complete` is False if it was stopped at its limit. The rest is as in `omni.session.Answer`."""

    complete: bool
    tokens_read: int
    tokens_written: int
    confidence: float | None = None
    familiar: Familiar | None = None


@dataclass(frozen=True)
class Vectors:
    """The vectors of items, float32[D] each."""

    values: Sequence[NDArray[np.float32]]


Event = Piece | Vectors | End


class LeftError(Exception):
    """The client is gone, so the answer is not needed."""


class Job:
    """A request that waits, and its answer."""

    def __init__(self, request: Any, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.request, self.wanted = request, True
        self._loop, self._events = loop, asyncio.Queue[Event | Exception]()

    def tell(self, event: Event | Exception) -> None:
        """Send an event to the client. The worker calls this."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def check_wanted(self) -> None:
        """Raise `LeftError` if the client is gone. The worker calls this wherever it can stop."""
        if not self.wanted:
            raise LeftError

    async def answer(self) -> AsyncIterator[Event]:
        """The pieces of the answer as they are written, and its end. If the iterator is closed, writing stops.

        Raises:
            RequestError: the request cannot be answered.
        """
        try:
            while True:
                event = await self._events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            self.wanted = False


class StoppedError(Exception):
    """The answer contains a stop text."""


class Writing(BaseStreamer):
    """The streamer that gets the tokens of `generate`.

    The end of the text is held back while it may be the beginning of a stop text.

    Args:
        job: gets the pieces of the answer.
        tokenizer: the Thinker's tokenizer.
        ends: the tokens that end an answer.
    """

    def __init__(self, job: Job, tokenizer: Any, ends: set[int]) -> None:
        self.logprobs: deque[torch.Tensor] = deque()
        """float[V] of each step whose token has not arrived yet. On some devices tokens arrive one step late."""
        self._job, self._tokenizer, self._ends = job, tokenizer, ends
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] | None = None
        self._text, self._told = "", 0
        self._tokens: list[tuple[int, Token]] = []  # each with the place in the text where it begins
        self._stopped = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt first, then each token."""
        self._job.check_wanted()
        if self._ids is None:
            self._ids = []
            return
        for token in value.flatten().tolist():
            self._add(token)

    def end(self) -> None:
        """Do nothing: `finish` ends the answer, also after a stop text."""

    def _add(self, token: int) -> None:
        assert self._ids is not None
        self._ids.append(token)
        start, stops = len(self._text), self._job.request.stop
        self._text += self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        if self.logprobs and token not in self._ends:
            self._tokens.append((start, self._describe(token, self.logprobs.popleft())))
        seen = start - max(map(len, stops), default=0)
        found = [at for stop in stops if (at := self._text.find(stop, max(seen, 0))) >= 0]
        if found:
            self._text, self._stopped = self._text[: min(found)], True
            raise StoppedError
        may_begin = (n for stop in stops for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        self._tell(len(self._text) - max(may_begin, default=0))

    def _describe(self, token: int, logprobs: torch.Tensor) -> Token:
        values, ids = logprobs.topk(min(self._job.request.alternatives or 0, len(logprobs)))
        likely = [(self._shown(each), value) for each, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return Token(self._shown(token), float(logprobs[token]), likely)

    def _shown(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))

    def _tell(self, until: int) -> None:
        """Send the text up to this place."""
        tokens = [token for start, token in self._tokens if start < until]
        if until > self._told or tokens:
            self._job.tell(Piece(self._text[self._told : until], tokens))
            self._told = max(until, self._told)
            self._tokens = [(start, token) for start, token in self._tokens if start >= until]

    @property
    def ids(self) -> list[int]:
        """The tokens that were written."""
        return list(self._ids or [])

    def finish(self, read: int, confidence: float | None = None, familiar: Familiar | None = None) -> None:
        """Send the rest of the text and the end of the answer."""
        ids = self._ids or []
        if not self._stopped:  # the stream may have held back an incomplete character
            whole = self._tokenizer.decode(ids, skip_special_tokens=True)
            self._text = whole if whole.startswith(self._text) else self._text
        self._tell(len(self._text))
        complete = self._stopped or bool(ids and ids[-1] in self._ends)
        self._job.tell(End(complete, read, len(ids), confidence, familiar))


class Scores(LogitsProcessor):
    """Records the probabilities of each step, then applies a request's bias and penalties."""

    def __init__(self, request: Request, writing: Writing, read: int, model: Any) -> None:
        size = model.config.text_config.vocab_size
        if strangers := [token for token in request.logit_bias if int(token) >= size]:
            raise RequestError(f"In 'logit_bias': expected ids of tokens below {size:,}, found {strangers[0]!r}.")
        self._request, self._writing, self._read = request, writing, read
        self._bias = torch.zeros(size, device=model.device)
        for token, value in request.logit_bias.items():
            self._bias[int(token)] = value

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The changed scores float[1, V], after the tokens int64[1, L]."""
        request = self._request
        if request.alternatives is not None:
            self._writing.logprobs.append(scores[0].float().log_softmax(-1))
        if request.logit_bias:
            scores = scores + self._bias
        if request.frequency_penalty or request.presence_penalty:
            counts = torch.bincount(input_ids[0, self._read :], minlength=scores.shape[-1])
            scores = scores - request.frequency_penalty * counts - request.presence_penalty * (counts > 0)
        return scores
