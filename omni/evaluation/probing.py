"""Measure an encoder without a language model: nearest neighbours, linear probes and retrieval on its frozen features.

The features are its two outputs, the CLS vector ("cls") and the mean of the grid ("grid"). Three questions are asked:

* **kNN**: do pictures with the same label lie together? The most frequent label among the nearest others, by cosine.
* **probe**: can a linear layer read off the label? Logistic regression on standardised features.
* **retrieval**: is a second drawing of the same objects (same places, other backdrop, shades and jitter) nearest to the
  first drawing, among the first drawings of all?

The pictures are those of a world (`omni.worlds`), such as held-out scenes: count, background and brightness of any scene;
shape, colour, size and pattern of scenes with one object. A second set does not come from a world: scans of handwritten
digits of 8 x 8 pixels. It has two baselines of the same width, random projections of the pixels and the same encoder
untrained. Classifiers are fitted on other pictures than those that they are scored on.
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

from .hashes import canonical
from .picture_sets import DIGIT, SEED, DrawnTwice, PictureSet, digit_pictures, wanted
from .scores import Asked, EvaluationError, Score, score
from .settings import EncoderSettings

Features = dict[str, NDArray[np.float32]]
"""For each output, "cls" and "grid": float32[B, D] for B pictures."""

NEIGHBOURS = 20
SAME = "same objects"
"""The name of the retrieval task: find the first drawing of the objects that a second drawing shows."""


# --- Neighbours, probes, retrieval ------------------------------------------------------------------------------------


def neighbours(known: NDArray[Any], labels: Sequence[str], asked: NDArray[Any], k: int) -> list[str]:
    """The most frequent label of the k nearest by cosine: F known features float[F, D], A asked ones float[A, D]."""
    from sklearn.neighbors import KNeighborsClassifier

    return list(KNeighborsClassifier(n_neighbors=k, metric="cosine").fit(known, labels).predict(asked))


def probe(known: NDArray[Any], labels: Sequence[str], asked: NDArray[Any]) -> list[str]:
    """The label that a linear layer gives: fitted on F known features float[F, D], read off A asked ones float[A, D]."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    return list(classifier.fit(known.astype(np.float64), labels).predict(asked.astype(np.float64)))


def nearest(queries: NDArray[Any], gallery: NDArray[Any], k: int) -> NDArray[np.int64]:
    """The places of the k nearest by cosine, nearest first, int64[N, k]. `queries` and `gallery` are float[N, D].

    A query's own partner in the gallery has the same place. Among equally near ones the partner comes last, so an encoder
    with collapsed features finds nothing.
    """
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (queries, gallery)]
    similarity = unit[0].astype(np.float64) @ unit[1].astype(np.float64).T  # (N, N)
    own = np.eye(len(queries), dtype=bool)
    return np.lexsort((own, -np.round(similarity, 9)), axis=1)[:, :k]


# --- The whole evaluation ---------------------------------------------------------------------------------------------

Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the number done, and the total number."""


@dataclass(frozen=True)
class EncoderAnswers:
    """The answers that were read off an encoder's features.

    Attributes:
        scores: scores by kind, "task / method / output".
        asked: every question with its answer.
        shown: for each `Asked.example`, a function that draws its pictures.
        data_hash: sha256 of all pictures with their labels.
    """

    scores: list[Score]
    asked: list[Asked]
    shown: list[Callable[[], tuple[Image.Image, ...]]]
    data_hash: str


def evaluate_encoder(
    encoder: Encoder, settings: EncoderSettings, progress: Progress = lambda label, done, total: None
) -> EncoderAnswers:
    """Run neighbours, probes and retrieval on an encoder; see the module.

    Raises:
        EvaluationError: scikit-learn is not installed, or a kind of question is unknown.
        WorldError: the kinds need a world, and it is not installed.
    """
    world = None if settings.kinds and set(settings.kinds) == {DIGIT} else find_world()
    known = (*world.tasks, SAME, DIGIT) if world else (DIGIT,)
    if unknown := sorted(set(settings.kinds or ()) - set(known)):
        raise EvaluationError(f"Unknown kinds of questions {unknown} for an encoder; known: {', '.join(known)}.")
    if find_spec("sklearn") is None:
        raise EvaluationError(
            'Evaluating an encoder needs scikit-learn, which is not installed; pip install "omni-thinker[eval]".'
        )
    return _Probing(encoder, settings, world, progress).answers()


class _Probing:
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
            self.read_digits(digit_pictures(self.encoder.probes()[0].height))
        chances = {f"recall@{k}": k / self.settings.pictures for k in (1, 5)}
        scores = [
            found.model_copy(update={"constant": chances[part], "constant_answer": "chance"})
            if (part := found.kind.split(" / ")[1]) in chances
            else found
            for found in score(self.asked)
        ]
        return EncoderAnswers(scores, self.asked, self.shown, self.digest.hexdigest())

    def encode(self, label: str, pictures: Iterable[Image.Image], total: int, *others: Encoder) -> list[Features]:
        """The features of some pictures, from this encoder and from others that read the same tensors."""
        encoders, batch_size = (self.encoder, *others), self.settings.batch_size
        return encode_pictures(
            *(encoders, pictures, batch_size, self.digest),
            lambda done: self.progress(f"encoding, {label} pictures", done, total),
        )

    def classify(self, pictures: PictureSet, features: Mapping[tuple[str, str], NDArray[Any]]) -> None:
        """Ask for the labels of each task. `features` are by task and output, which name the score."""
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
                for example, (place, answer) in enumerate(zip(pictures.ask, given, strict=True), first):
                    kind, source = f"{called} / {method} / {output}", f"{pictures.name} {place}"
                    self.asked.append(Asked(kind, kind, labels[place], str(answer), source, example))

    def retrieve(self, drawn: DrawnTwice) -> None:
        """Ask which first drawing shows the same as each second drawing."""
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
        """Ask for the digits, from the encoder and from the two baselines of the same width."""
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


def encode_pictures(
    encoders: Sequence[Encoder],
    pictures: Iterable[Image.Image],
    batch_size: int,
    digest: Any,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Features]:
    """The features of pictures from each encoder. All encoders read the tensors that the first one prepares.

    Args:
        encoders: the encoders.
        pictures: the pictures, at least one.
        batch_size: number of pictures in a batch.
        digest: a hash, which is given the bytes of every picture.
        advance: called with the number of pictures that are done.
    """
    found: list[list[Features]] = [[] for _ in encoders]
    for done, batch in _batches(pictures, batch_size):
        for picture in batch:
            digest.update(picture.tobytes())
        prepared = encoders[0].prepare(batch)
        for parts, encoder in zip(found, encoders, strict=True):
            parts.append(features_of(encoder.encode(prepared)))
        advance(done)
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in found]


def features_of(tokens: Mapping[str, torch.Tensor]) -> Features:
    """The mean over the tokens of each output."""
    return {name: tokens[name].float().mean(1).cpu().numpy() for name in ("cls", "grid") if name in tokens}


def _batches(pictures: Iterable[Image.Image], size: int) -> Iterator[tuple[int, list[Image.Image]]]:
    """Lists of at most `size` pictures, each with the number of pictures up to its end."""
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
