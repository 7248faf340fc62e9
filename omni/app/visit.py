"""One visitor of the page: the pictures that they chose, what they asked about them, and where the Thinker looked."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.looking.attention import WordAttention, session_attention
from omni.looking.panels import as_seen, overlay
from omni.session import Answer, QuestionError, Session, check_question
from omni.vision.pictures import PictureError, read_picture

WIDTH = 512
"""Of a picture on the page, in pixels."""

MOST = 8
"""Pictures of a visitor: each is encoded for a question, while others wait."""


@dataclass(frozen=True)
class Chosen:
    """A picture as it is kept: the file, which is small, rather than its pixels, and how it looks on the page."""

    name: str
    file: bytes
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
        taken, refused = [], []
        for name, file in files:
            try:
                taken.append(Chosen(name, file, as_seen(image_processor, read_picture(file), WIDTH)))
            except PictureError as error:
                refused.append(str(error).replace(f"The given picture ({len(file):,} bytes)", repr(name)))
        kept = self.pictures if together else []
        room = MOST - len(kept)
        refused += [
            f"{each.name!r} is one too many, expected at most {MOST}; remove others first." for each in taken[room:]
        ]
        if taken:
            self._show([*kept, *taken[:room]])
        return refused

    def remove(self, number: int) -> None:
        """Take one of the pictures away."""
        self._show([picture for place, picture in enumerate(self.pictures) if place != number])

    def _show(self, pictures: list[Chosen]) -> None:
        self.pictures = pictures
        self.answer = self.word = self._session = self._attention = None

    def ask(self, question: str, model: OmniForConditionalGeneration, processor: OmniProcessor) -> Iterator[Answer]:
        """Ask about the pictures.

        Yields:
            What there is of the answer; the last is whole. It ends early when other pictures are chosen meanwhile.

        Raises:
            QuestionError: nothing to ask, nothing to ask about, or too much.
        """
        question = check_question(question)
        if not self.pictures and "image" in processor.preprocessors:
            raise QuestionError("There is no picture yet; upload, draw or pick one, and ask again.")
        self.answer = self.word = self._attention = None
        decoding, session = 0.0, self._session
        if session is None:
            begun = time.perf_counter()
            opened = [read_picture(picture.file) for picture in self.pictures]
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
