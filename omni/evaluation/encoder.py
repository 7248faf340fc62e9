"""How much an encoder sees, without a language model: neighbours, linear probes and retrieval.

Three questions are put to its two outputs, the CLS vector ("cls") and the mean of the grid ("grid"), which stay as they
are:

* **kNN**: do pictures with the same answer lie together? The answer of most of the nearest others, by cosine.
* **probe**: can one linear layer read the answer off? Logistic regression on standardised features.
* **retrieval**: does a second drawing of the same objects (same places, other backdrop, shades and jitter) lie nearest
  to the first among those of all others?

The first two are asked about held-out scenes: count, background and brightness of any scene, and shape, colour, size and
pattern of scenes with one object. And about pictures that nobody drew for this purpose: scanned handwritten digits of
8 x 8 pixels, with two baselines of the same width, random projections of the pixels and the same encoder untrained.
What learns is fitted on other pictures than those asked about.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from omni.answering import CheckpointError
from omni.data import scenes
from omni.registry import get_modality

from .picture_sets import (
    KINDS,
    SEED,
    PictureSet,
    different_scenes,
    digit_pictures,
    draw_again,
    scene_pictures,
    wanted,
)
from .result import EncoderSettings, canonical
from .scores import Asked, EvaluationError, Score, score

Features = dict[str, NDArray[np.float32]]
"""By output, "cls" and "grid": float32[B, D] for B pictures."""

NEIGHBOURS = 20


# --- The encoder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A vision encoder with its image processor."""

    model: PreTrainedModel
    image_processor: Any
    pooled: bool = True  # whether its `pooler_output` is trained

    @property
    def side(self) -> int:
        """Height and width of the pictures that it was made for."""
        side = getattr(self.model.config, "image_size", None) or self.image_processor.size["height"]
        return int(side if isinstance(side, int) else side[0])

    def untrained(self) -> "Encoder":
        """The same architecture with new random weights, the same ones every time."""
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = AutoModel.from_config(copy.deepcopy(self.model.config), dtype=self.model.dtype)
        return replace(self, model=model.to(self.model.device).eval(), pooled=True)

    def prepare(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """float[B, 3, H, W]"""
        pixels = self.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> Features:
        """The features of prepared pictures."""
        modality = get_modality("image")
        encoded = self.model(pixel_values=pixel_values)
        if not self.pooled:
            encoded["pooler_output"] = None
        (shape, *_) = modality.grid_shapes(self.model.config, {"pixel_values": pixel_values})
        tokens = modality.read(encoded, int(np.prod(shape)))
        return {name: tokens[name].float().mean(1).cpu().numpy() for name in ("cls", "grid") if name in tokens}


def load_encoder(checkpoint: str | Path) -> Encoder:
    """Load a vision encoder from a folder, omni's or one of transformers; nothing is fetched from anywhere.

    Of a model of several parts, such as CLIP, its vision tower is taken.

    Raises:
        CheckpointError: no encoder of pictures in the folder, no image processor, one that makes pictures which the
            encoder does not take, or weights that are not whole.
    """
    folder, modality = Path(checkpoint), get_modality("image")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        config = getattr(config, "vision_config", None) or config
        pooled = True
        if config.model_type == modality.config_class.model_type:
            model = modality.model_class.from_pretrained(folder)
        else:
            model, report = AutoModel.from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
            )
            lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
            # classifiers are saved without ViT's pooler, which comes after what is read
            pooled = not any(name.startswith("pooler.") for name in lacking)
            if lost := [name for name in lacking if not name.startswith("pooler.")]:
                more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
                raise ValueError(f"its weights lack or mis-shape {', '.join(lost[:5])}{more}.")
        if model.main_input_name != "pixel_values":
            raise ValueError(f"a {type(model).__name__} reads {model.main_input_name!r}, expected a model of pictures.")
        encoder = Encoder(model.eval(), AutoImageProcessor.from_pretrained(folder), pooled)
        encoder.encode(encoder.prepare([Image.new("RGB", (encoder.side, encoder.side))]))
    except (ValueError, OSError, SafetensorError, StrictDataclassError) as error:
        raise CheckpointError(f"The checkpoint {str(folder)!r} cannot be loaded as an encoder: {error}") from error
    return encoder


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


@dataclass
class EncoderReport:
    """What was found.

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
) -> EncoderReport:
    """Neighbours, probes and retrieval of an encoder; see the module.

    Raises:
        EvaluationError: scikit-learn is not installed, or an unknown kind of question.
    """
    if unknown := sorted(set(settings.kinds or ()) - set(KINDS)):
        raise EvaluationError(f"Unknown kinds of questions {unknown} to an encoder; known: {', '.join(KINDS)}.")
    if find_spec("sklearn") is None:
        raise EvaluationError(
            'The evaluation of an encoder needs scikit-learn, which is not installed; pip install "omni-thinker[eval]".'
        )
    return _Run(encoder, settings, progress).report()


class _Run:
    def __init__(self, encoder: Encoder, settings: EncoderSettings, progress: Progress) -> None:
        self.encoder, self.settings, self.progress = encoder, settings, progress
        self.digest = hashlib.sha256()
        self.asked: list[Asked] = []
        self.shown: list[Callable[[], tuple[Image.Image, ...]]] = []

    def report(self) -> EncoderReport:
        for pictures in (scene_pictures(self.settings, "scene", 6), scene_pictures(self.settings, "object", 1)):
            if not pictures.labels:
                continue
            (features,) = self.encode(pictures.name, map(pictures.draw, range(len(pictures))), len(pictures))
            self.classify(pictures, {(task, name): f for task in pictures.labels for name, f in features.items()})
        if wanted(self.settings, "same objects"):
            self.retrieve()
        if wanted(self.settings, "digit"):
            self.read_digits(digit_pictures(self.encoder.side))
        chances = {f"recall@{k}": k / self.settings.pictures for k in (1, 5)}
        scores = [
            found.model_copy(update={"constant": chances[part], "constant_answer": "chance"})
            if (part := found.kind.split(" / ")[1]) in chances
            else found
            for found in score(self.asked)
        ]
        return EncoderReport(scores, self.asked, self.shown, self.digest.hexdigest())

    def encode(self, label: str, pictures: Iterable[Image.Image], total: int, *others: Encoder) -> list[Features]:
        """The features of a set of pictures, of this encoder and of others that see the same tensors."""
        encoders = (self.encoder, *others)
        found: list[list[Features]] = [[] for _ in encoders]
        for done, batch in _batches(pictures, self.settings.batch_size):
            for picture in batch:
                self.digest.update(picture.tobytes())
            prepared = self.encoder.prepare(batch)
            for parts, encoder in zip(found, encoders, strict=True):
                parts.append(encoder.encode(prepared))
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

    def retrieve(self) -> None:
        """For each scene drawn again, which one of all scenes shows the same objects?"""
        count = self.settings.pictures
        originals = different_scenes(count, self.settings.first)
        copies = [draw_again(scene) for scene in originals]
        (gallery,) = self.encode("gallery", map(scenes.render, originals), count)
        (queries,) = self.encode("query", map(scenes.render, copies), count)
        first = len(self.shown)
        self.shown += [
            lambda one=one, other=other: (scenes.render(one), scenes.render(other))  # type: ignore[misc]
            for one, other in zip(copies, originals, strict=True)
        ]
        names = [scenes.caption(scene) for scene in originals]
        for output in gallery:
            found = nearest(queries[output], gallery[output], 5)
            for k in (1, 5):
                for place, best in enumerate(found[:, :k].tolist()):
                    answer = names[place if place in best else best[0]]
                    kind = f"same objects / recall@{k} / {output}"
                    source = f"scene {originals[place].seed} drawn again"
                    self.asked.append(Asked(kind, kind, names[place], answer, source, first + place))

    def read_digits(self, digits: PictureSet) -> None:
        """Digits, with the two baselines of the same width."""
        trained, untrained = self.encode(
            "digit", map(digits.draw, range(len(digits))), len(digits), self.encoder.untrained()
        )
        assert digits.pixels is not None
        width = next(iter(trained.values())).shape[1]
        projection = np.random.default_rng(SEED).standard_normal((digits.pixels.shape[1], width))
        self.classify(
            digits,
            {
                **{("digit", output): values for output, values in trained.items()},
                **{("digit, untrained", output): values for output, values in untrained.items()},
                ("digit, projection", "pixels"): digits.pixels @ projection,
            },
        )


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
