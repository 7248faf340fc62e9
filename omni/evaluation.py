"""Evaluation that can be trusted: exact match by kind of question, with its uncertainty and with what guessing gets.

Questions are asked the way a user asks: one prompt, one picture, greedy generation, and the answer compared to the last
character. Beside every accuracy stand the number of questions, the 95 % interval, and the score of the best constant
answer. The sight test asks the same questions with the picture blanked, exchanged or turned to noise: a model that uses
the picture falls to about what a constant answer gets.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from omni.answering import make_prompts
from omni.data import scenes

Sight = Literal["real", "blank", "swapped", "noise"]
SIGHTS: tuple[Sight, ...] = ("real", "blank", "swapped", "noise")


class Score(BaseModel):
    """Exact match on the questions of one kind.

    Attributes:
        n: questions asked.
        accuracy, low, high: share of right answers and its 95 % interval (Wilson score).
        constant, constant_answer: what always giving the most frequent answer would score, and that answer.
    """

    model_config = ConfigDict(frozen=True)

    kind: str
    n: int
    accuracy: float
    low: float
    high: float
    constant: float
    constant_answer: str


class Evaluation(BaseModel):
    """The scores of a checkpoint, and what is needed to ask the same again."""

    model_config = ConfigDict(frozen=True)

    checkpoint: str
    fingerprints: dict[str, str]
    split: str
    pictures: int
    first: int
    wordings: str
    sight: Sight
    seconds: float
    scores: list[Score]

    def score(self, kind: str) -> Score:
        """The score of one kind of question."""
        return next(score for score in self.scores if score.kind == kind)


@dataclass(frozen=True)
class Asked:
    """One question about one picture, and what was answered."""

    kind: str
    question: str
    expected: str
    answer: str


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `right` among `n` (Wilson 1927), which holds near 0 and 1 too."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def score(asked: Iterable[Asked]) -> list[Score]:
    """Scores by kind, in the order in which the kinds first occur.

    A caption also yields `caption_objects`: the share of objects of which size, pattern, colour, shape and place are right.
    """
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for item in asked:
        by_kind.setdefault(item.kind, []).append((item.expected, item.answer))
        if item.kind == "caption":
            wanted = Counter(tuple(sorted(o.items())) for o in scenes.parse_caption(item.expected))
            found = Counter(tuple(sorted(o.items())) for o in scenes.parse_caption(item.answer))
            hits = (wanted & found).total()
            pairs = [("right", "right")] * hits + [("right", "wrong")] * (wanted.total() - hits)
            by_kind.setdefault("caption_objects", []).extend(pairs)
    scores = []
    for kind, pairs in by_kind.items():
        right, n = sum(expected == answer for expected, answer in pairs), len(pairs)
        low, high = wilson_interval(right, n)
        answer, count = Counter(expected for expected, _ in pairs).most_common(1)[0]
        if kind == "caption_objects":
            answer, count = "-", 0
        scores.append(
            Score(
                kind=kind,
                n=n,
                accuracy=right / n,
                low=low,
                high=high,
                constant=count / n,
                constant_answer=answer if len(answer) < 40 else "-",
            )
        )
    return scores


def evaluate_scenes(
    model: Any,
    processor: Any,
    *,
    split: str = "test",
    pictures: int = 500,
    first: int = 0,
    wordings: Literal["seen", "held_out"] = "seen",
    sight: Sight = "real",
    kinds: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Evaluation, list[Asked]]:
    """Ask one question of every possible kind about each of `pictures` scenes.

    Args:
        model, processor: a fused model that answers about pictures.
        split: "test" (never seen), or "pairs" (with held-out pairs of shape and colour).
        first: seed of the first scene.
        wordings: those of the training questions, or held-out ones.
        kinds: the kinds of questions; all by default.
        sight: "real" shows the picture; "blank" a grey one, "swapped" that of another scene, "noise" random pixels.
        progress: called with the number of pictures done.

    Returns:
        The evaluation, and every question with its answer.
    """
    weights = dict.fromkeys(kinds or scenes.WORDINGS, 1.0)
    start = time.perf_counter()
    asked: list[Asked] = []
    waiting: list[tuple[str, str, str, Image.Image]] = []
    for done in range(pictures):
        scene = scenes.sample_scene(first + done, split)
        picture = _shown(sight, scene, first + done, split)
        for question in scenes.questions(scene, scene.seed, wordings=wordings, weights=weights):
            waiting.append((question.kind, question.text, question.answer, picture))
        while len(waiting) >= batch_size or (waiting and done == pictures - 1):
            batch, waiting = waiting[:batch_size], waiting[batch_size:]
            answers = generate_answers(model, processor, [(q, [p]) for _, q, _, p in batch])
            asked += [Asked(k, q, a, found) for (k, q, a, _), found in zip(batch, answers, strict=True)]
        progress(done + 1)
    evaluation = Evaluation(
        checkpoint=str(model.config._name_or_path),
        fingerprints=model.config.fingerprints or {},
        split=split,
        pictures=pictures,
        first=first,
        wordings=wordings,
        sight=sight,
        seconds=round(time.perf_counter() - start, 1),
        scores=score(asked),
    )
    return evaluation, asked


def uses_the_picture(evaluations: Sequence[Evaluation]) -> bool:
    """The sight test: over all questions, the real pictures must beat every other kind beyond the intervals of both."""

    def overall(evaluation: Evaluation) -> tuple[float, float]:
        counted = [score for score in evaluation.scores if score.kind != "caption_objects"]
        return wilson_interval(round(sum(s.accuracy * s.n for s in counted)), sum(s.n for s in counted))

    by_sight = {evaluation.sight: overall(evaluation) for evaluation in evaluations}
    return all(by_sight["real"][0] > high for sight, (_, high) in by_sight.items() if sight != "real")


def _shown(sight: Sight, scene: scenes.Scene, seed: int, split: str) -> Image.Image:
    if sight == "real":
        return scenes.render(scene)
    if sight == "swapped":
        return scenes.render(scenes.sample_scene(seed + 1_000_003, split))
    if sight == "blank":
        return Image.new("RGB", (scene.size, scene.size), (128, 128, 128))
    pixels = np.random.default_rng(seed).integers(0, 256, (scene.size, scene.size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.inference_mode()
def generate_answers(
    model: Any, processor: Any, prompts: Sequence[tuple[str, Sequence[Image.Image]]], max_new_tokens: int = 192
) -> list[str]:
    """Greedy answers to questions about pictures, as one batch; each is what the prompt alone would get."""
    inputs = make_prompts(processor, prompts)
    output = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
    return [
        text.strip()
        for text in processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


def render(evaluation: Evaluation) -> Table:
    """The scores as a table for the terminal."""
    table = Table(
        title=f"{evaluation.checkpoint}: {evaluation.pictures} pictures of {evaluation.split}, {evaluation.sight}"
    )
    for column in ("kind", "n", "exact match", "95 % interval", "best constant answer"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for row in evaluation.scores:
        table.add_row(
            row.kind,
            str(row.n),
            f"{row.accuracy:.3f}",
            f"{row.low:.3f} - {row.high:.3f}",
            f"{row.constant:.3f} ({row.constant_answer})",
        )
    return table
