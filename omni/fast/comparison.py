"""Compares the speed and the results of each fast path with the reference, on a checkpoint and on this machine.

    for path in compare("checkpoints/omni_tiny"):
        print(path.name, path.speed / path.reference_speed, path.difference)

The reference for embeddings is the encoder itself in float32. The reference for answers is `generate` without acceleration,
which reads the picture again for each question. Reference and fast path take turns, so that a slower machine slows both.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, computed_field

from omni.embedding.engine import TOLERANCE, Engine, EngineError, What
from omni.fast.jpeg import read_pixels
from omni.fusion.acceleration import Acceleration, using
from omni.loading.checkpoint import load
from omni.loading.encoder import Encoder, load_encoder
from omni.questions import Answer
from omni.session import Session
from omni.vision.pictures import read_picture
from omni.vision.plugin import side_of
from omni.worlds import find_world

WRITTEN = 48
"""Most tokens of an answer."""

PHOTO = (1280, 960)
"""Width and height of the JPEG files for which scaled decoding is tried, in pixels."""


Ask = Callable[[str, int], Answer]
"""From a question and the most tokens of its answer to the answer."""


class FastPath(BaseModel):
    """One fast path and its reference.

    Attributes:
        name: its name.
        unit: what its speed counts per second.
        reference_speed, speed: medians.
        difference: its difference from the reference, see `of`.
        of: "embeddings", the largest |difference| / |token|; "answers", the share of answers with other words.
        reference_right, right: the share of answers that are as expected.
        tolerance: the largest allowed difference; None for a path that is not exact and is used only on request.
        refused: why it is not used; None if it is used.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    unit: str
    reference_speed: float
    speed: float
    difference: float
    of: str
    tolerance: float | None
    reference_right: float | None = None
    right: float | None = None
    refused: str | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def within(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.tolerance is None or self.difference <= self.tolerance


def compare(
    checkpoint: str | Path,
    count: int = 32,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda name: None,
) -> Iterator[FastPath]:
    """Compare each fast path of a checkpoint with the reference, on scenes that are not in any training.

    Args:
        checkpoint: folder of a fused model, or of an encoder, which has no answers.
        count: number of pictures.
        rounds: number of times that each path is timed.
        progress: called with the name of the next path.

    Raises:
        CheckpointError: see `load_encoder`.
        QuestionError: the Thinker has no room for a question and an answer of `WRITTEN` tokens.
        WorldError: the scenes are not installed.
    """
    questions = find_world().settings(pictures=count).questionnaire()
    encoder = load_encoder(checkpoint, "image")
    items = [questions[index] for index in range(count)]
    pictures = [item.items["image"][0] for item in items]
    yield from _embeddings(encoder, pictures, rounds, progress)
    progress("JPEG files")
    yield from _decoding(encoder, pictures, rounds)
    if encoder.fused is not None:
        asked = [item.queries for item in items]
        model, processor = load(checkpoint)
        progress("answers")
        yield from _answers(model, processor, pictures, asked)
        progress("answers, scaled decoding")
        yield _scaled_answers(model, processor, _side(encoder), pictures, asked)


# --- Embeddings -------------------------------------------------------------------------------------------------------


def _embeddings(
    encoder: Encoder, pictures: Sequence[Image.Image], rounds: int, progress: Callable[[str], None]
) -> Iterator[FastPath]:
    tokens = encoder.encode(encoder.prepare(pictures))

    def reference() -> Any:
        return encoder.encode(encoder.prepare(pictures))

    for what in (name for name in get_args(What) if name in tokens):
        expected = torch.cat([encoder.encode(encoder.prepare([picture]))[what] for picture in pictures])
        for precision in ("float32", "bfloat16"):
            name = f"{what}, {precision}"
            progress(name)
            common: dict[str, Any] = {"name": name, "unit": "pictures", "of": "embeddings"}
            common["tolerance"] = TOLERANCE[precision]
            try:
                engine = Engine(encoder, what, precision)
            except EngineError as error:
                (speed,) = _speeds([reference], rounds, len(pictures))
                yield FastPath(**common, reference_speed=speed, speed=speed, difference=0.0, refused=str(error))
                continue

            def fast(engine: Engine = engine) -> Any:
                return np.stack(engine([engine.prepare(picture) for picture in pictures]))

            slow_speed, fast_speed = _speeds([reference, fast], rounds, len(pictures))
            difference = _difference(torch.from_numpy(fast()), expected)
            yield FastPath(**common, reference_speed=slow_speed, speed=fast_speed, difference=difference)


def _decoding(encoder: Encoder, pictures: Sequence[Image.Image], rounds: int) -> Iterator[FastPath]:
    files = [_jpeg(picture) for picture in pictures]
    engine = Engine(encoder, "cls" if "cls" in encoder.encode(encoder.prepare(pictures[:1])) else "grid")

    def as_pictures() -> Any:
        return np.stack(engine([engine.prepare(read_picture(file)) for file in files]))

    def embed(at_least: int | None = None) -> Any:
        return np.stack(engine([engine.prepare(read_pixels(file, at_least)[0]) for file in files]))

    side = _side(encoder)
    reference, whole, scaled = _speeds([as_pictures, embed, lambda: embed(side)], rounds, len(files))
    expected = torch.from_numpy(as_pictures())
    common: dict[str, Any] = {"unit": "files", "reference_speed": reference, "of": "embeddings"}
    name = f"JPEG files of {PHOTO[0]}x{PHOTO[1]}"
    difference = _difference(torch.from_numpy(embed()), expected)
    yield FastPath(**common, name=f"{name}, to pixels", speed=whole, difference=difference, tolerance=0.0)
    difference = _difference(torch.from_numpy(embed(side)), expected)
    scaled_name = f"{name}, scaled decoding (where asked for)"
    yield FastPath(**common, name=scaled_name, speed=scaled, difference=difference, tolerance=None)


def _side(encoder: Encoder) -> int:
    return side_of(encoder.model.config, encoder.preprocessor)


def _jpeg(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.resize(PHOTO, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def _speeds(ways: Sequence[Callable[[], Any]], rounds: int, items: int) -> list[float]:
    """Items per second of each way: the median of rounds in which all take turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for way, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            if number:  # the first is for warming up
                taken.append(time.perf_counter() - start)
    return [items / median(taken) for taken in seconds]


# --- Answers ----------------------------------------------------------------------------------------------------------


def _answers(
    model: Any, processor: Any, pictures: Sequence[Image.Image], asked: Sequence[Sequence[Any]]
) -> Iterator[FastPath]:
    def anew(picture: Image.Image) -> Ask:
        return lambda text, limit: Session(model, processor, [picture]).ask(text, limit)

    own, quick, further, own_further = (_Asked() for _ in range(4))
    for picture, questions in zip(pictures, asked, strict=True):
        session = Session(model, processor, [picture])
        for number, question in enumerate(questions):
            with using(Acceleration()):
                own.ask(question, anew(picture))
            quick.ask(question, anew(picture))
            if number:  # the picture has been read
                further.ask(question, session.ask)
                own_further.add(own)
            else:
                session.ask(question.text, WRITTEN)
    yield quick.beside(own, "first question: oneDNN products, quick steps", tolerance=0.0)
    yield further.beside(own_further, "a further question: what was read is not read again", tolerance=0.0)


def _scaled_answers(
    model: Any,
    processor: Any,
    side: int,
    pictures: Sequence[Image.Image],
    asked: Sequence[Sequence[Any]],
) -> FastPath:
    def read(file: bytes, at_least: int | None) -> Ask:
        return lambda text, limit: Session(model, processor, [read_picture(file, at_least)]).ask(text, limit)

    whole, scaled = _Asked(), _Asked()
    for picture, questions in zip(pictures, asked, strict=True):
        file = _jpeg(picture)
        for question in questions:
            whole.ask(question, read(file, None))
            scaled.ask(question, read(file, side))
    name = f"answers about JPEG files of {PHOTO[0]}x{PHOTO[1]}, scaled decoding (where asked for)"
    return scaled.beside(whole, name, tolerance=None)


class _Asked:
    """Records the answers of one way of answering, whether they are right, and their times."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.right: list[bool] = []
        self.seconds: list[float] = []

    def ask(self, question: Any, ask: Ask) -> None:
        start = time.perf_counter()
        said = ask(question.text, WRITTEN).answer
        self.seconds.append(time.perf_counter() - start)
        self.texts.append(said)
        self.right.append(said == question.expected)

    def add(self, other: "_Asked") -> None:
        """Add the last answer of another way."""
        for name, values in vars(other).items():
            vars(self)[name].append(values[-1])

    def beside(self, reference: "_Asked", name: str, tolerance: float | None) -> FastPath:
        count = len(self.texts)
        return FastPath(
            name=name,
            unit="answers",
            reference_speed=1 / median(reference.seconds),
            speed=1 / median(self.seconds),
            difference=sum(a != b for a, b in zip(self.texts, reference.texts, strict=True)) / count,
            of="answers",
            tolerance=tolerance,
            reference_right=sum(reference.right) / count,
            right=sum(self.right) / count,
        )


# --- Output ----------------------------------------------------------------------------------------------------------


def table(paths: Sequence[FastPath]) -> Any:
    """The paths as a table of rich, for the terminal."""
    from rich.table import Table

    made = Table("fast path", title="fast paths and the reference")
    for title in ("of", "reference /s", "fast /s", "x", "difference", "tolerance", "right", ""):
        made.add_column(title, justify="right")
    for path in paths:
        verdict = (
            "not taken" if path.refused else "" if path.tolerance is None else "ok" if path.within else "TOO FAR OFF"
        )
        made.add_row(
            path.name,
            path.unit,
            f"{path.reference_speed:,.0f}",
            f"{path.speed:,.0f}",
            f"{path.speed / path.reference_speed:.2f}",
            f"{path.difference:.1%}" if path.of == "answers" else f"{path.difference:.1e}",
            "stated" if path.tolerance is None else f"{path.tolerance:g}",
            "" if path.right is None else f"{path.reference_right:.1%}, {path.right:.1%}",
            verdict,
        )
    return made
