"""One visitor of the page: the chosen items, the questions and answers about them, and the Thinker's attention.

All of it is kept in memory, up to limits, until the visitor leaves.
"""

import copy
import pickle
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageOps

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.items import read_item
from omni.looking.attention import Floats, WordAttention, session_attention
from omni.looking.panels import as_seen, overlay
from omni.modality import ItemError, Modality
from omni.questions import Answer, QuestionError
from omni.registry import get_modality
from omni.session import Session

WIDTH, SMALL = 512, 64
"""Width of an item on the page and in the history, in pixels."""

MOST = 8
"""The largest number of a visitor's items. A question encodes all of them, while other visitors wait."""

MOST_BYTES = 64 * 2**20
"""The largest size of a visitor's files together, in bytes."""

MOST_OPEN = 300_000_000
"""The largest size of a visitor's open items together, in bytes: 100 million pixels. A question opens all of them."""

LONGEST = 4000
"""The largest number of characters of a question."""

KEPT = 20
"""The number of a visitor's questions that are kept with their answers."""

VISITORS = 32
"""The largest number of visits. A further visitor replaces the one who was idle longest."""

IDLE = 3600.0
"""Seconds after which a visitor who does nothing is forgotten."""


@dataclass(frozen=True)
class Chosen:
    """A chosen item. It is kept as a file, which is smaller than the open item.

    Attributes:
        modality: the name of its modality.
        name, file: name and content of the file, as they were sent.
        media_type: the media type under which a browser can play it, such as "audio/wav"; else empty.
        size: size of the open item in bytes.
        seen: its picture for the page; None if its modality has no `show`.
        key: a token with which its visitor gets the file back.
    """

    modality: str
    name: str
    file: bytes
    media_type: str
    size: int
    seen: Image.Image | None
    key: str = field(default_factory=secrets.token_urlsafe)


@dataclass(frozen=True)
class View:
    """An item on the page, perhaps with a word's attention drawn over it.

    Attributes:
        name: the name of its file.
        picture: its picture; None if its modality has no `show`.
        weight: the share of the word's attention that it gets; None if no word is looked at.
    """

    name: str
    picture: Image.Image | None
    weight: float | None = None


@dataclass(frozen=True)
class Turn:
    """A question, the answer, and the items that it was about."""

    question: str
    answer: str
    about: tuple[View, ...]


@dataclass
class Visit:
    """The items and answers of one visitor. Several of the visitor's requests may run at the same time.

    Attributes:
        items: the items in the order in which they were chosen.
        answer: the last complete answer about them.
        word: the number of the answer's word that is looked at, from 0 on.
        turns: questions and answers, the oldest first.
    """

    items: list[Chosen] = field(default_factory=list)
    answer: Answer | None = None
    word: int | None = None
    turns: list[Turn] = field(default_factory=list)
    _session: Session | None = None
    _attention: WordAttention | None = None
    _changing: Any = field(default_factory=threading.Lock)
    """Held while related fields change, and never for long."""

    def as_it_is(self) -> "Visit":
        """A copy, which does not change."""
        with self._changing:
            return copy.copy(self)

    def choose(self, name: str, file: bytes, media_type: str, processor: OmniProcessor, together: bool) -> None:
        """Add an item to the chosen ones, or replace them with it.

        Args:
            name, file, media_type: as the browser sent them. Only audio and video can be played.
            processor: the model's processor.
            together: keep the earlier items.

        Raises:
            ItemError: the file is no item of the model's modalities, or there are too many or too large ones.
        """

        def earlier(size: int) -> list[Chosen]:
            items = self.items if together else []
            if len(items) >= MOST:
                raise ItemError(f"{name!r} is one too many, expected at most {MOST}; remove others first.")
            _bound(name, "bytes", MOST_BYTES, len(file), *(len(each.file) for each in items))
            _bound(name, "bytes when they are open", MOST_OPEN, size, *(each.size for each in items))
            return items

        earlier(0)
        try:
            modality, value = read_item(file, [each.name for each in takes(processor)], name)
        except ItemError as error:  # the message speaks of bytes, but the visitor knows the file by its name
            sentence = re.sub(rf"The given [\w ]+ \({len(file):,} bytes\)", lambda _: repr(name), str(error))
            raise ItemError(sentence) from error
        size = _open_size(value)
        earlier(size)
        show, seen = get_modality(modality).show, None
        if show is not None:
            seen = as_seen(processor.preprocessors[modality], show(value), WIDTH)
        plays = re.match(r"(audio|video)/[\w.+-]+(?=;|$)", media_type)
        chosen = Chosen(modality, name, file, plays[0] if plays else "", size, seen)
        with self._changing:
            self._show([*earlier(size), chosen])

    def wait(self) -> None:
        """Remove the answer, because there will be another."""
        with self._changing:
            self.answer = self.word = None

    def remove(self, number: int) -> None:
        """Remove one of the items."""
        with self._changing:
            self._show([item for place, item in enumerate(self.items) if place != number])

    def forget(self) -> None:
        """Remove everything. An answer that is being written stops."""
        with self._changing:
            self._show([])
            self.turns = []

    def _show(self, items: list[Chosen]) -> None:
        self.items = items
        self.answer = self.word = self._session = self._attention = None

    def ask(
        self, question: str, model: OmniForConditionalGeneration, processor: OmniProcessor
    ) -> Generator[Answer, None, None]:
        """Ask about the items.

        Args:
            question: the question; by default the most common one of training.
            model, processor: they answer.

        Yields:
            The beginning of the answer each time it has grown, finally the complete answer. The iterator ends early if the
            items change.

        Raises:
            QuestionError: there is no question or no item, or they are too long.
            ItemError: the encoder does not take an item.
        """
        question = question.strip() or processor.prompt or ""
        if len(question) > LONGEST:
            raise QuestionError(
                f"The question has {len(question):,} characters, expected at most {LONGEST:,}; shorten it."
            )
        items = self.items
        if not items and (bundles := takes(processor)):
            nouns = " or ".join(bundle.noun for bundle in bundles)
            raise QuestionError(f"There is no {nouns} yet; choose one, and ask again.")
        decoding, session = 0.0, self._session
        if session is None:
            begun = time.perf_counter()
            opened = [read_item(item.file, [item.modality]) for item in items]
            decoding = time.perf_counter() - begun
            session = Session(model, processor, opened)
        with self._changing:
            if self.items is not items:
                return
            self._session = session
            self.answer = self.word = self._attention = None
        for answer in session.stream(question):
            if self._session is not session:
                return
            if answer.seconds:  # it is complete
                answer = answer.model_copy(update={"seconds": {"decoding": round(decoding, 4), **answer.seconds}})
                about = tuple(View(item.name, _small(item.seen)) for item in items)
                with self._changing:
                    if self._session is not session:
                        return
                    self.answer = answer
                    self.turns = [*self.turns, Turn(answer.question, answer.answer, about)][-KEPT:]
            yield answer

    def look(self, word: int) -> None:
        """Look at a word of the answer, or stop looking at it if it is looked at already.

        Raises:
            AttentionError: the model returns no attention maps.
        """
        now = self.as_it_is()
        if now.answer is None or now._session is None or not 0 <= word < len(now.answer.answer.split()):
            return  # the answer is gone
        attention = now._attention or session_attention(now._session, now.answer.question)
        with self._changing:
            if self.answer is now.answer:
                self._attention, self.word = attention, None if word == self.word else word

    def views(self) -> list[View]:
        """The items, with the Thinker's attention over them if a word is looked at. Call it on a copy (`as_it_is`)."""
        attention, word = self._attention, self.word
        if attention is None or word is None:
            return [View(item.name, item.seen) for item in self.items]
        return [
            View(item.name, _laid_over(item.seen, maps[word]), float(maps[word].sum()))
            for item, maps in zip(self.items, attention.maps, strict=True)
        ]


def takes(processor: OmniProcessor) -> list[Modality]:
    """The modalities of a model whose files a visitor can choose."""
    return [bundle for bundle in processor.bundles if bundle.open is not None]


def _laid_over(picture: Image.Image | None, weights: Floats) -> Image.Image | None:
    """The picture with weights drawn over it; without them if they are of CLS alone, or have more than two axes."""
    return picture if picture is None or not weights.size or weights.ndim > 2 else overlay(picture, weights)


def _small(picture: Image.Image | None) -> Image.Image | None:
    return None if picture is None else ImageOps.contain(picture, (SMALL, SMALL))


def _bound(name: str, unit: str, most: int, *sizes: int) -> None:
    if sum(sizes) > most:
        raise ItemError(
            f"With {name!r} the files have {sum(sizes):,} {unit}, expected at most {most:,}; remove others, or make it "
            "smaller."
        )


def _open_size(value: Any) -> int:
    """The approximate size of an open item in bytes, which is that of its pickle."""
    counter = _Counter()
    pickle.Pickler(counter, pickle.HIGHEST_PROTOCOL).dump(value)
    return counter.bytes


class _Counter:
    """A file that counts its bytes and keeps none."""

    bytes = 0

    def write(self, data: Any) -> None:
        """Count the bytes."""
        self.bytes += memoryview(data).nbytes


class Visits:
    """All visits, each under a token that only its visitor knows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[Visit, float]] = {}
        """Each visit with the time of its last use, in the order of these times."""

    def open(self) -> str:
        """The token of a new visit."""
        token = secrets.token_urlsafe()
        self._kept[token] = Visit(), self._clock()
        if len(self._kept) > VISITORS:
            self.leave(next(iter(self._kept)))
        return token

    def find(self, token: str) -> Visit | None:
        """The visit with this token; None if it does not exist or is forgotten."""
        self.sweep()
        if token not in self._kept:
            return None
        visit, _ = self._kept.pop(token)
        self._kept[token] = visit, self._clock()
        return visit

    def leave(self, token: str) -> None:
        """Forget a visit."""
        visit, _ = self._kept.pop(token, (Visit(), 0.0))
        visit.forget()

    def sweep(self) -> None:
        """Forget visitors who did nothing for `IDLE` seconds."""
        now = self._clock()
        for token in [token for token, (_, used) in self._kept.items() if now - used > IDLE]:
            self.leave(token)
