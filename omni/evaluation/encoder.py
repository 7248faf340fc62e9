"""How much an encoder sees, without a language model: neighbours, linear probes and retrieval.

Three questions are put to its two outputs, the CLS vector ("cls") and the mean of the grid ("grid"), which stay as they
are:

* **kNN**: do pictures with the same answer lie together? The answer of most of the nearest others, by cosine.
* **probe**: can one linear layer read the answer off? Logistic regression on standardised features.
* **retrieval**: does a second drawing of the same objects (same places, other backdrop, shades and jitter) lie nearest
  to the first among those of all others?

The first two are asked about what a world draws (`omni.worlds`), held-out scenes: count, background and brightness of any
scene, and shape, colour, size and pattern of scenes with one object. And about pictures that nobody drew for this purpose:
scanned handwritten digits of 8 x 8 pixels, with two baselines of the same width, random projections of the pixels and the
same encoder untrained. What learns is fitted on other pictures than those asked about.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from omni.loading.encoder import Encoder
from omni.worlds import World, find_world

from .picture_sets import DIGIT, SEED, DrawnTwice, PictureSet, digit_pictures, wanted
from .result import EncoderSettings, canonical
from .scores import Asked, EvaluationError, Score, score

Features = dict[str, NDArray[np.float32]]
"""By output, "cls" and "grid": float32[B, D] for B pictures."""

NEIGHBOURS = 20
SAME = "same objects"
"""What is retrieved: the first drawing of what a second one shows."""


# --- Neighbours, probes, retrieval ------------------------------------------------------------------------------------


def neighbours(known: NDArray[Any], labels: Sequence[str], asked: NDArray[Any], k: int) -> list[str]:
    """The answer of most of the k nearest by cosine, for float[F, D] to fit on and float[A, D] asked about."""
    from sklearn.neighbors import KNeighborsClassifier

    return list(KNeighborsClassifier(n_neighbors=k, metric="cosine").fit(known, labels).predict(asked))


def probe(known: NDArray[Any], labels: Sequence[str], asked: NDArray[Any]) -> list[str]:
    """The answer that one linear layer gives, for float[F, D] to fit on and float[A, D] asked about."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return list(classifier.fit(known.astype(np.float64), labels).predict(asked.astype(np.float64)))


def nearest(queries: NDArray[Any], gallery: NDArray[Any], k: int) -> NDArray[np.int64]:
    """int64[N, k]: places of the nearest by cosine, the nearest first; float[N, D] each.

    Where the one that belongs to a query (that of its own place) is as near as another, it comes last: a collapsed
    encoder, for which all are alike, finds nothing.
    """
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (queries, gallery)]
    similarity = unit[0].astype(np.float64) @ unit[1].astype(np.float64).T  # (N, N)
    own = np.eye(len(queries), dtype=bool)
    return np.lexsort((own, -np.round(similarity, 9)), axis=1)[:, :k]


# --- The whole evaluation ---------------------------------------------------------------------------------------------

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True)
class EncoderAnswers:
    """What was read off an encoder's features.

    Attributes:
        scores: by kind, "task / method / output".
        asked: every question, with the answer that was read off the features.
        shown: for each `Asked.item`, what draws its pictures.
        data_hash: sha256 of all pictures with their labels.
    """

    scores: list[Score]
    asked: list[Asked]
    shown: list[Callable[[], tuple[Image.Image, ...]]]
    data_hash: str


def evaluate_encoder(
    encoder: Encoder, settings: EncoderSettings, progress: Progress = lambda label, done, total: None
) -> EncoderAnswers:
    """Neighbours, probes and retrieval of an encoder; see the module.

    Raises:
        EvaluationError: scikit-learn is not installed, or an unknown kind of question.
        WorldError: more than digits is asked about, and the world that draws it is not installed.
    """
    world = None if settings.kinds and set(settings.kinds) == {DIGIT} else find_world()
    known = (*world.tasks, SAME, DIGIT) if world else (DIGIT,)
    if unknown := sorted(set(settings.kinds or ()) - set(known)):
        raise EvaluationError(f"Unknown kinds of questions {unknown} to an encoder; known: {', '.join(known)}.")
    if find_spec("sklearn") is None:
        raise EvaluationError(
            'The evaluation of an encoder needs scikit-learn, which is not installed; pip install "omni-thinker[eval]".'
        )
    return _Questioning(encoder, settings, world, progress).answers()


class _Questioning:
    def __init__(self, encoder: Encoder, settings: EncoderSettings, world: World | None, progress: Progress) -> None:
        self.encoder, self.settings, self.world, self.progress = encoder, settings, world, progress
        self.digest = hashlib.sha256()
        self.asked: list[Asked] = []
        self.shown: list[Callable[[], tuple[Image.Image, ...]]] = []

    def answers(self) -> EncoderAnswers:
        if self.world:
            for pictures in self.world.picture_sets(self.settings):
                if not pictures.labels:
                    continue
                (features,) = self.encode(pictures.name, map(pictures.draw, range(len(pictures))), len(pictures))
                self.classify(pictures, {(task, name): f for task in pictures.labels for name, f in features.items()})
            if wanted(self.settings, SAME):
                self.retrieve(self.world.drawn_twice(self.settings.pictures, self.settings.first))
        if wanted(self.settings, DIGIT):
            self.read_digits(digit_pictures(self.encoder.side))
        chances = {f"recall@{k}": k / self.settings.pictures for k in (1, 5)}
        scores = [
            found.model_copy(update={"constant": chances[part], "constant_answer": "chance"})
            if (part := found.kind.split(" / ")[1]) in chances
            else found
            for found in score(self.asked)
        ]
        return EncoderAnswers(scores, self.asked, self.shown, self.digest.hexdigest())

    def encode(self, label: str, pictures: Iterable[Image.Image], total: int, *others: Encoder) -> list[Features]:
        """The features of a set of pictures, of this encoder and of others that see the same tensors."""
        encoders = (self.encoder, *others)
        found: list[list[Features]] = [[] for _ in encoders]
        for done, batch in _batches(pictures, self.settings.batch_size):
            for picture in batch:
                self.digest.update(picture.tobytes())
            prepared = self.encoder.prepare(batch)
            for parts, encoder in zip(found, encoders, strict=True):
                parts.append(features_of(encoder.encode(prepared)))
            self.progress(f"encoding, {label} pictures", done, total)
        return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in found]

    def classify(self, pictures: PictureSet, features: Mapping[tuple[str, str], NDArray[Any]]) -> None:
        """Ask for each task's answers; `features` by what the score is called: task and output."""
        self.digest.update(canonical(dict(pictures.labels)).encode())
        first = len(self.shown)
        self.shown += [lambda place=place: (pictures.draw(place),) for place in pictures.ask]  # type: ignore[misc]
        for (called, output), values in features.items():
            labels = pictures.labels[called.split(",")[0]]
            known, answers = values[pictures.fit], [labels[place] for place in pictures.fit]
            by_method = {
                "kNN": neighbours(known, answers, values[pictures.ask], NEIGHBOURS),
                "probe": probe(known, answers, values[pictures.ask]),
            }
            for method, given in by_method.items():
                for item, (place, answer) in enumerate(zip(pictures.ask, given, strict=True), first):
                    kind, source = f"{called} / {method} / {output}", f"{pictures.name} {place}"
                    self.asked.append(Asked(kind, kind, labels[place], str(answer), source, item))

    def retrieve(self, drawn: DrawnTwice) -> None:
        """For each picture drawn again, which one of all first drawings shows the same?"""
        names = drawn.shows
        places = range(len(names))
        (gallery,) = self.encode("gallery", map(drawn.draw, places), len(names))
        (queries,) = self.encode("query", map(drawn.draw_again, places), len(names))
        first = len(self.shown)
        self.shown += [lambda place=place: (drawn.draw_again(place), drawn.draw(place)) for place in places]  # type: ignore[misc]
        for output in gallery:
            found = nearest(queries[output], gallery[output], 5)
            for k in (1, 5):
                for place, best in enumerate(found[:, :k].tolist()):
                    answer = names[place if place in best else best[0]]
                    kind = f"{SAME} / recall@{k} / {output}"
                    self.asked.append(Asked(kind, kind, names[place], answer, drawn.sources[place], first + place))

    def read_digits(self, digits: PictureSet) -> None:
        """Digits, with the two baselines of the same width."""
        trained, untrained = self.encode(
            DIGIT, map(digits.draw, range(len(digits))), len(digits), self.encoder.untrained(SEED)
        )
        assert digits.pixels is not None
        width = next(iter(trained.values())).shape[1]
        projection = np.random.default_rng(SEED).standard_normal((digits.pixels.shape[1], width))
        self.classify(
            digits,
            {
                **{(DIGIT, output): values for output, values in trained.items()},
                **{(f"{DIGIT}, untrained", output): values for output, values in untrained.items()},
                (f"{DIGIT}, projection", "pixels"): digits.pixels @ projection,
            },
        )


def features_of(tokens: Mapping[str, torch.Tensor]) -> Features:
    """The mean of each output's tokens."""
    return {name: tokens[name].float().mean(1).cpu().numpy() for name in ("cls", "grid") if name in tokens}


def _batches(pictures: Iterable[Image.Image], size: int) -> Iterator[tuple[int, list[Image.Image]]]:
    """Pictures in lists of at most `size`, each with how many there have been."""
    batch: list[Image.Image] = []
    done = 0
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            done += size
            yield done, batch
            batch = []
    if batch:
        yield done + len(batch), batch
