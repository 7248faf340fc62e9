"""Measure an encoder on your own pictures: the same thing drawn by others, and copies of a picture.

A data set of pictures (`omni.data.manifests`) has a label for each picture, its answer or caption. The folder that a picture
lies in is its group: who drew it, or which camera saw it. A row may also have a `kind`, such as the category of its label.

* **same label**: is the nearest picture of the other groups one with the same label?
* **kind**: is the nearest picture of the other groups with another label at least of the same kind?
* **near-duplicate**: is the picture that a copy was made from the nearest of all pictures? Copies are a JPEG file of quality
  30, a crop of 90 % of both sides, and a reduction to 30 % of both sides.

Features are compared by cosine, after their mean over all pictures is subtracted. Beside the encoder stand two baselines:
the same encoder with random weights, and 16 x 16 pixels.
"""

import hashlib
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni.data.collate import expect_taken
from omni.data.conversations import ExampleError
from omni.data.manifests import Manifest, Row
from omni.loading.encoder import Encoder

from .hashes import canonical
from .picture_sets import SEED
from .probing import EncoderAnswers, Progress, encode_pictures
from .scores import Asked, EvaluationError, score
from .settings import PictureSettings

SIDE = 16
"""Width and height of the pictures whose pixels are a baseline."""
QUERIES_AT_ONCE = 256
SAME_LABEL, KIND, COPY = "same label", "kind", "near-duplicate"


def as_jpeg(picture: Image.Image, place: int) -> Image.Image:
    """Through a JPEG file of quality 30."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image, place: int) -> Image.Image:
    """90 % of both sides, from anywhere in the picture."""
    where = random.Random(f"{SEED} {place}")
    sides = [max(1, round(side * 0.9)) for side in picture.size]
    left, top = (where.randint(0, whole - part) for whole, part in zip(picture.size, sides, strict=True))
    return picture.crop((left, top, left + sides[0], top + sides[1]))


def reduced(picture: Image.Image, place: int) -> Image.Image:
    """30 % of both sides."""
    return picture.resize([max(1, round(side * 0.3)) for side in picture.size], Image.Resampling.BILINEAR)


COPIES: Mapping[str, Callable[[Image.Image, int], Image.Image]] = {
    "JPEG 30": as_jpeg,
    "crop 90 %": cropped,
    "scale 30 %": reduced,
}


class Labelled:
    """The rows of a data set with their labels and groups. Pictures are opened on access.

    Attributes:
        labels, groups, kinds: of each row.
        queries: the groups that ask and are not searched.
        asked: places of the rows that ask.
        across: whether there is more than one group, and it is asked about labels.

    Raises:
        EvaluationError: a row has no picture or several, a group of `queries` is unknown, or a label has no picture in the
            groups that it is searched in.
        ManifestError: the data set cannot be read.
    """

    def __init__(self, settings: PictureSettings) -> None:
        across = not {*settings.kinds} <= {COPY}
        self.manifest = Manifest.read(settings.data, root=settings.root, answers=across)
        rows = [_expect_one_picture(row) for row in self.manifest]
        self.labels = [row.answer.strip() if across else "" for row in rows]
        self.groups = [row.files[0].path.parent.name for row in rows]
        self.kinds = [row.kind for row in rows]
        if strangers := sorted(set(settings.queries) - set(self.groups)):
            raise EvaluationError(
                f"No picture of {settings.data!r} lies in a folder {strangers[0]!r}; its groups are "
                f"{', '.join(sorted(set(self.groups)))}."
            )
        self.queries = set(settings.queries)
        self._number = np.unique(self.groups, return_inverse=True)[1]
        self._searched = np.array([group not in self.queries for group in self.groups])
        self.asked = [place for place, group in enumerate(self.groups) if not self.queries or group in self.queries]
        self.across = across and len(set(self.groups)) > 1
        if self.across:
            self._expect_partners(rows)

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, place: int) -> Image.Image:
        """The picture of a row."""
        picture: Image.Image = self.manifest[place].open()["image"][0]
        return picture

    def show(self, place: int) -> tuple[Image.Image, ...]:
        """The pictures of an example: that of a row."""
        return (self.open(place),)

    def searched(self, place: int) -> NDArray[np.bool_]:
        """bool[N]: the pictures that a query is compared with: those of other groups that ask nothing themselves."""
        found: NDArray[np.bool_] = (self._number != self._number[place]) & self._searched
        return found

    def _expect_partners(self, rows: Sequence[Row]) -> None:
        groups_of: dict[str, set[str]] = {}
        for label, group in zip(self.labels, self.groups, strict=True):
            groups_of.setdefault(label, set()).add(group)
        for place in self.asked:
            if not groups_of[self.labels[place]] - self.queries - {self.groups[place]}:
                raise EvaluationError(
                    f"{rows[place].source}: no other group has a picture of {self.labels[place]!r}, so none can be found; "
                    "leave the row out."
                )


def _expect_one_picture(row: Row) -> Row:
    try:
        expect_taken(row.source, [file.modality for file in row.files], ["image"])
    except ExampleError as error:
        raise EvaluationError(str(error)) from error
    if len(row.files) != 1:
        raise EvaluationError(f"{row.source} has {len(row.files)} pictures; an encoder is measured on rows with one.")
    return row


Features = dict[tuple[str, str], NDArray[np.float32]]
"""By baseline ("" for the encoder itself) and output: float32[N, D]."""


def evaluate_across(
    encoder: Encoder, settings: PictureSettings, progress: Progress = lambda label, done, total: None
) -> EncoderAnswers:
    """Search across groups, and search the originals of copies; see the module.

    Raises:
        EvaluationError, ManifestError, ItemError: see `Labelled`; a picture cannot be read.
    """
    data, digest = Labelled(settings), hashlib.sha256()
    digest.update(canonical([data.labels, data.groups, data.kinds]).encode())
    encoders = {"": encoder, ", untrained": encoder.untrained(SEED)}

    def features(label: str, pictures: Iterator[Image.Image], total: int) -> Features:
        pixels: list[NDArray[np.float32]] = []

        def seen() -> Iterator[Image.Image]:
            for picture in pictures:
                pixels.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32).ravel())
                yield picture

        found = encode_pictures(
            list(encoders.values()), seen(), settings.batch_size, digest, lambda done: progress(label, done, total)
        )
        by_name = {(name, output): f for name, each in zip(encoders, found, strict=True) for output, f in each.items()}
        return {**by_name, (", pixels", "pixels"): np.stack(pixels)}

    places = range(len(data))
    known = features("encoding, pictures", map(data.open, places), len(data))
    asked = [each for each in _ask_across(data, known) if each.kind.split(" / ")[0].split(",")[0] in settings.kinds]
    step = max(1, len(data) // settings.pictures)
    copied = list(islice(places, 0, None, step))[: settings.pictures]
    for name, copy in COPIES.items() if COPY in settings.kinds else ():
        copies = features(f"encoding, {name}", (copy(data.open(place), place) for place in copied), len(copied))
        for (baseline, output), queries in copies.items():
            everything = known[baseline, output]
            found = nearest_in(queries, everything, 1, lambda i: np.ones(len(data), bool), copied)[:, 0]
            kind = f"{COPY}, {name}{baseline} / recall@1 / {output}"
            asked += [
                Asked(kind, kind, str(place), str(best), data.manifest.source(place), place)
                for place, best in zip(copied, found.tolist(), strict=True)
            ]
    shown: list[Callable[[], tuple[Image.Image, ...]]] = [partial(data.show, place) for place in places]
    scores = [
        found.model_copy(update={"constant": 1 / len(data), "constant_answer": "chance"})
        if found.kind.startswith(COPY)
        else found
        for found in score(asked)
    ]
    return EncoderAnswers(scores, asked, shown, digest.hexdigest())


def _ask_across(data: Labelled, known: Features) -> Iterator[Asked]:
    if not data.across:
        return
    labels, kinds = np.array(data.labels), data.kinds
    for (baseline, output), features in known.items():
        queries = features[data.asked]
        found = nearest_in(queries, features, 5, lambda i: data.searched(data.asked[i]))
        for k in (1, 5):
            kind = f"{SAME_LABEL}{baseline} / recall@{k} / {output}"
            for place, best in zip(data.asked, found[:, :k].tolist(), strict=True):
                given = [data.labels[other] if other >= 0 else "" for other in best]
                answer = data.labels[place] if data.labels[place] in given else given[0]
                yield Asked(kind, kind, data.labels[place], answer, data.manifest.source(place), place)
        if any(kinds):
            others = nearest_in(
                queries,
                features,
                1,
                lambda i: data.searched(data.asked[i]) & (labels != labels[data.asked[i]]),
            )[:, 0]
            kind = f"{KIND}{baseline} / nearest / {output}"
            for place, best in zip(data.asked, others.tolist(), strict=True):
                answer = str(kinds[best]) if best >= 0 else ""
                yield Asked(kind, kind, str(kinds[place]), answer, data.manifest.source(place), place)


def nearest_in(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    k: int,
    searched: Callable[[int], NDArray[np.bool_]],
    own: Sequence[int] | None = None,
) -> NDArray[np.int64]:
    """The places int64[Q, k] of the k nearest by centred cosine, nearest first; -1 where fewer may be found.

    Args:
        queries: float32[Q, D].
        gallery: float32[N, D]. Its mean is subtracted from both.
        k: how many.
        searched: for the number of a query, bool[N]: the places that may be found.
        own: for each query the place that is right. Among equally near ones it comes last, so an encoder whose features
            are all the same finds nothing.
    """
    mean = gallery.mean(0, dtype=np.float64)
    unit = [(x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True).clip(1e-9) for x in (queries, gallery)]
    found = np.full((len(queries), k), -1)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        table = np.round(unit[0][start : start + QUERIES_AT_ONCE] @ unit[1].T, 9)
        for row, similarity in enumerate(table, start):
            similarity[~searched(row)] = -np.inf
            if own is not None:
                similarity[own[row]] -= 1e-9
            best = np.argsort(-similarity, kind="stable")[:k]
            found[row, : len(best)] = np.where(np.isfinite(similarity[best]), best, -1)
    return found
