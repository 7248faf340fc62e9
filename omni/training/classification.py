"""Classification: an encoder and a linear head learn to which class an item belongs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from omni.classification.configuration_classifier import OmniClassifierConfig
from omni.classification.modeling_classifier import OmniForClassification
from omni.data.collate import expect_taken
from omni.data.conversations import ExampleError
from omni.data.manifests import Manifest
from omni.loading.encoder import load_encoder
from omni.loading.preprocessor import save_preprocessor
from omni.registry import get_modality, prepare_items
from omni.training.encoder import build_encoder
from omni.training.order import mix
from omni.training.pixels import cross_as_bytes
from omni.training.recipe import Recipe, said_by_recipe
from omni.training.sections import ClassifierSection, Drawn, Files, Mixture

SAID_CLASSES = 20
"""The largest number of classes that a message names."""


class Classification:
    """The objective "classification": cross-entropy of the class of each item, which is the first answer about it.

    Raises:
        ExampleError: there is only one class, or each row has a class of its own; or a row of `evaluate` has another.
    """

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.model
        assert isinstance(section, ClassifierSection)
        encoder, self.processor, name = _encoder(section)
        self.bundle = get_modality(name)
        self.train, self.evaluate = classes(recipe.train, name), classes(recipe.evaluate, name)
        self.names = _names(self.train)
        self._numbers = {label: number for number, label in enumerate(self.names)}
        if self.evaluate is not None:
            for index in range(len(self.evaluate)):
                self._number(self.evaluate.label(index))
        with said_by_recipe("model.output", section.output):
            config = OmniClassifierConfig(
                modality=name,
                encoder_config=encoder.config,
                output=section.output,
                id2label=dict(enumerate(self.names)),
            )
            self.model = OmniForClassification(config)
        self.model.encoder.load_state_dict(encoder.state_dict())
        self.options = cross_as_bytes(self.model, {name: self.processor}).get(name, {})

    def collate(self, examples: Sequence[tuple[Any, str]]) -> dict[str, Any]:
        """B items with their classes -> the inputs of the modality, and `labels` int64[B]."""
        items, labels = zip(*examples, strict=True)
        inputs = prepare_items(self.bundle, self.processor, list(items), {"return_tensors": "pt", **self.options})
        return {**inputs, "labels": torch.tensor([self._number(label) for label in labels])}

    def _number(self, label: str) -> int:
        """The number of a class."""
        if label not in self._numbers:
            raise ExampleError(
                f"A row is of the class {label!r}, expected one of the training data: {_listed(self.names)}."
            )
        return self._numbers[label]

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Logits float[B, C] -> the likeliest classes int64[B]."""
        found: torch.Tensor = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
        return found

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The share of right classes, and that of the best constant answer: the most frequent class."""
        labels = np.asarray(prediction.label_ids)
        right = float((np.asarray(prediction.predictions) == labels).mean())
        return {"accuracy": right, "best_constant": float(np.bincount(labels).max() / len(labels))}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the classifier and its preprocessor."""
        assert isinstance(model, OmniForClassification)
        model.save_pretrained(folder)
        save_preprocessor(self.processor, folder)


class ManifestClasses(torch.utils.data.Dataset[tuple[Any, str]]):
    """For each row of a manifest its one item and the first answer about it, the class.

    Args:
        manifest: the rows.
        modality: the modality of the items.

    Raises:
        ExampleError: on access to a row with no item of the modality, with several, or with one of another.
    """

    def __init__(self, manifest: Manifest, modality: str) -> None:
        self.manifest, self.modality, self.blocks = manifest, modality, manifest.blocks

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        row = self.manifest[index]
        expect_taken(row.source, [file.modality for file in row.files], [self.modality])
        if len(row.files) != 1:
            noun = get_modality(self.modality).noun
            raise ExampleError(f"{row.source} has {len(row.files)} {noun}s; a classifier needs exactly one.")
        return row.open()[self.modality][0], self.label(index)

    def label(self, index: int) -> str:
        """The class of a row. The item is not opened."""
        return self.manifest[index].answer.strip()


def classes(data: Drawn | Files | Mixture | None, modality: str) -> Any:
    """A sequence of (item, class) with a method `label(index)`, from files; None for None."""

    def read(part: Any) -> ManifestClasses:
        assert isinstance(part, Files)  # a recipe refuses others
        return ManifestClasses(part.manifest(), modality)

    return None if data is None else mix(data, read)


def _names(examples: Any) -> list[str]:
    """The classes of all examples, sorted."""
    counts = Counter(examples.label(index) for index in range(len(examples)))
    if len(counts) == 1:
        raise ExampleError(
            f"All {len(examples):,} rows are of the class {next(iter(counts))!r}; a classifier needs two."
        )
    if len(counts) == len(examples):
        raise ExampleError(
            f"Each of {len(examples):,} rows has an answer of its own, and a classifier learns a class from several items; "
            "use the objective 'answers' for texts."
        )
    return sorted(counts)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SAID_CLASSES:,} more" if len(names) > SAID_CLASSES else ""
    return ", ".join(map(repr, names[:SAID_CLASSES])) + more


def _encoder(section: ClassifierSection) -> tuple[PreTrainedModel, Any, str]:
    """The encoder that the classifier begins with, its preprocessor and the name of its modality."""
    if section.encoder is None or section.config:
        name = section.modality or "image"
        encoder, preprocessor = build_encoder(section, name)
    else:
        with said_by_recipe("model.encoder", section.encoder):
            loaded = load_encoder(section.encoder, section.modality)
        encoder, preprocessor, name = loaded.model, loaded.preprocessor, loaded.modality
    if section.size is not None:
        with said_by_recipe("model.size", section.size):
            if not hasattr(encoder, "take_size"):
                raise ValueError(f"a {type(encoder).__name__} has a size of its own; leave `size` out.")
            encoder.take_size(section.size)
        preprocessor.size = {"height": section.size, "width": section.size}
    return encoder, preprocessor, name
