"""A folder becomes a classifier with its preprocessor, or an error of one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omni.checkpoints.folder import CheckpointError, expect_model, reason_of
from omni.checkpoints.seal import MODEL, verify_files
from omni.classification.configuration_classifier import OmniClassifierConfig
from omni.classification.modeling_classifier import OmniForClassification
from omni.loading.encoder import Encoder
from omni.loading.preprocessor import load_preprocessor
from omni.registry import get_modality


@dataclass(frozen=True)
class Classifier:
    """A classifier with its preprocessor.

    Attributes:
        model: the encoder and its head.
        encoder: the encoder and its preprocessor.
    """

    model: OmniForClassification
    encoder: Encoder

    @property
    def names(self) -> list[str]:
        """The names of the classes by number."""
        labels: dict[int, str] = self.model.config.id2label
        return [labels[number] for number in sorted(labels)]

    @torch.inference_mode()
    def __call__(self, items: Sequence[Any]) -> torch.Tensor:
        """The probability of each of C classes for B items, float32[B, C]."""
        shares: torch.Tensor = self.model(**self.encoder.prepare(items)).logits.float().softmax(-1)
        return shares


def load_classifier(checkpoint: str | Path) -> Classifier:
    """Load a classifier from a folder. Nothing is downloaded.

    Raises:
        CheckpointError: the folder holds no classifier; or a file is missing, damaged or exchanged.
    """
    folder = Path(checkpoint)
    expect_model(folder, OmniClassifierConfig.model_type)
    try:
        verify_files(folder, MODEL)
        model = OmniForClassification.from_pretrained(folder).eval()
        bundle = get_modality(model.config.modality)
        preprocessor = load_preprocessor(bundle, folder)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and other libraries read the files, and may raise anything
        raise CheckpointError(f"The checkpoint {str(folder)!r} cannot be loaded: {reason_of(error)}") from error
    return Classifier(model, Encoder(model.encoder, preprocessor, modality=bundle.name))
