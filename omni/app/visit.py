"""One visitor of the page: the pictures that they chose, what they asked about them, and where the Thinker looked.

All of it lies in memory, up to bounds, until the visitor leaves.
"""

import secrets
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.looking.attention import WordAttention, session_attention
from omni.looking.panels import as_seen, overlay
from omni.registry import ItemError, open_item
from omni.session import Answer, QuestionError, Session, check_question

WIDTH = 512
"""Of a picture on the page, in pixels."""

MOST = 8
"""Pictures of a visitor: each is encoded for a question, while others wait."""

MOST_BYTES = 64 * 2**20
"""Of a visitor's picture files together."""

MOST_PIXELS = 100_000_000
"""Of a visitor's pictures together, as all are decoded for a question."""

LONGEST = 4000
"""Characters of a question."""

VISITORS = 32
"""Whose pictures and answers are kept; when one more comes, whoever did nothing for the longest time is forgotten."""

IDLE = 3600.0
"""Seconds after which a visitor who does nothing is forgotten."""


@dataclass(frozen=True)
class Chosen:
    """A picture as it is kept: the file, which is small, rather than its pixels, and how it looks on the page."""

    name: str
    file: bytes
    pixels: int
    seen: Image.Image


@dataclass(frozen=True)
class View:
    """A picture on the page; laid over with where a word's attention lies in it, and how much of it does."""

    name: str
    picture: Image.Image
    weight: float | None = None


@dataclass
class Visit:
    """What one visitor has, in memory alone.

    Attributes:
        pictures: in the order in which they were chosen.
        answer: the last one about them, as soon as it is whole.
        word: which of its words is looked at, from 0 on.
    """

    pictures: list[Chosen] = field(default_factory=list)
    answer: Answer | None = None
    word: int | None = None
    _session: Session | None = None
    _attention: WordAttention | None = None

    def choose(self, files: Sequence[tuple[str, bytes]], image_processor: Any, together: bool) -> list[str]:
        """Take pictures, beside those that are there or in their place.

        Args:
            files: name and bytes of each.
            image_processor: that of the model, which may cut edges off.
            together: keep the earlier ones.

        Returns:
            For each that cannot be taken the sentence that says why.
        """
        pictures = list(self.pictures) if together else []
        before, refused = len(pictures), []
        for name, file in files:
            if len(pictures) == MOST:
                refused.append(f"{name!r} is one too many, expected at most {MOST}; remove others first.")
                continue
            try:
                _bound(name, "bytes", MOST_BYTES, len(file), *(len(each.file) for each in pictures))
                picture = open_item("image")(file)
                pixels = picture.width * picture.height
                _bound(name, "pixels", MOST_PIXELS, pixels, *(each.pixels for each in pictures))
                pictures.append(Chosen(name, file, pixels, as_seen(image_processor, picture, WIDTH)))
            except ItemError as error:
                refused.append(str(error).replace(f"The given picture ({len(file):,} bytes)", repr(name)))
        if len(pictures) > before:
            self._show(pictures)
        return refused

    def remove(self, number: int) -> None:
        """Take one of the pictures away."""
        self._show([picture for place, picture in enumerate(self.pictures) if place != number])

    def forget(self) -> None:
        """Take everything away; an answer that is being written ends."""
        self._show([])

    def _show(self, pictures: list[Chosen]) -> None:
        self.pictures = pictures
        self.answer = self.word = self._session = self._attention = None

    def ask(
        self, question: str, model: OmniForConditionalGeneration, processor: OmniProcessor
    ) -> Generator[Answer, None, None]:
        """Ask about the pictures.

        Yields:
            What there is of the answer; the last is whole. It ends early when other pictures are chosen meanwhile.

        Raises:
            QuestionError: nothing to ask, nothing to ask about, or too much.
        """
        question = check_question(question)
        if len(question) > LONGEST:
            raise QuestionError(
                f"The question has {len(question):,} characters, expected at most {LONGEST:,}; shorten it."
            )
        if not self.pictures and "image" in processor.preprocessors:
            raise QuestionError("There is no picture yet; upload, draw or pick one, and ask again.")
        self.answer = self.word = self._attention = None
        decoding, session = 0.0, self._session
        if session is None:
            begun = time.perf_counter()
            opened = [open_item("image")(picture.file) for picture in self.pictures]
            decoding = time.perf_counter() - begun
            session = self._session = Session(model, processor, opened)
        for answer in session.stream(question):
            if self._session is not session:
                return
            if answer.seconds:  # it is whole
                answer = answer.model_copy(update={"seconds": {"decoding": round(decoding, 4), **answer.seconds}})
                self.answer = answer
            yield answer

    def look(self, word: int) -> None:
        """Look at one of the words of the answer; at the same once more: no longer.

        Raises:
            AttentionError: a model that does not tell.
        """
        if self.answer is None or self._session is None or not 0 <= word < len(self.answer.answer.split()):
            return  # of an answer that is gone
        if self._attention is None:
            self._attention = session_attention(self._session, self.answer.question)
        self.word = None if word == self.word else word

    def views(self) -> list[View]:
        """The pictures, as they are or with where the Thinker looked for the word."""
        attention, word = self._attention, self.word
        if attention is None or word is None:
            return [View(each.name, each.seen) for each in self.pictures]
        return [
            View(each.name, overlay(each.seen, maps[word]), float(maps[word].sum()))
            for each, maps in zip(self.pictures, attention.maps, strict=True)
        ]


def _bound(name: str, unit: str, most: int, *sizes: int) -> None:
    if sum(sizes) > most:
        raise ItemError(
            f"With {name!r} the pictures have {sum(sizes):,} {unit}, expected at most {most:,}; remove others, or make it "
            "smaller."
        )


class Visits:
    """The visits of all, each under a token that its visitor alone knows."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: dict[str, tuple[Visit, float]] = {}
        """Each with when it was last used, in the order of that."""

    def open(self) -> str:
        """The token of a new visit."""
        token = secrets.token_urlsafe()
        self._kept[token] = Visit(), self._clock()
        if len(self._kept) > VISITORS:
            self.leave(next(iter(self._kept)))
        return token

    def find(self, token: str) -> Visit | None:
        """The visit of a token, unless it is forgotten or never was."""
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
        """Forget those who did nothing for `IDLE`."""
        now = self._clock()
        for token in [token for token, (_, used) in self._kept.items() if now - used > IDLE]:
            self.leave(token)
