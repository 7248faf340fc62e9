"""The text encoder beside an encoder that was trained with captions. Both make vectors of a common space.

encoder/            the encoder, and its preprocessor
encoder/text/       the text encoder, its tokenizer, and projections.safetensors
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from omni.checkpoints.fingerprints import fingerprint_parts
from omni.checkpoints.folder import CheckpointError, reason_of
from omni.loading.encoder import Encoder

FOLDER, PROJECTIONS = "text", "projections.safetensors"


@dataclass(frozen=True)
class TextReader:
    """A text encoder.

    Attributes:
        model, tokenizer: a text encoder of transformers and its tokenizer.
        projection: float32[P, D], maps the other encoder's CLS token to the common space.
        own: float32[P, T], maps the text encoder's pooled output to the common space.
    """

    model: Any
    tokenizer: Any
    projection: NDArray[np.float32]
    own: torch.Tensor

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> NDArray[np.float32]:
        """Vectors float32[B, P] of B texts."""
        words = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        pooled = self.model(input_ids=words["input_ids"], attention_mask=words["attention_mask"])[1]
        found: NDArray[np.float32] = (pooled @ self.own.T).float().numpy()
        return found


def save_text(folder: Path, encoder: Any, model: Any, tokenizer: Any, projection: Any, own: Any) -> None:
    """Write a text encoder beside the encoder that it was trained with.

    Args:
        folder: the folder of the encoder.
        encoder: the encoder.
        model, tokenizer: the text encoder and its tokenizer.
        projection, own: weights float[P, D] and float[P, T], see `TextReader`.
    """
    inside = folder / FOLDER
    model.save_pretrained(inside)
    tokenizer.save_pretrained(inside)
    tensors = {"projection": projection.detach().float().contiguous(), "own": own.detach().float().contiguous()}
    save_file(tensors, inside / PROJECTIONS, {"encoder": json.dumps(_fingerprint(encoder))})


def load_text(folder: Path, encoder: Encoder) -> TextReader:
    """The text encoder beside an encoder.

    Raises:
        CheckpointError: there is none, it cannot be read, or it was trained with another encoder.
    """
    inside = folder / FOLDER
    if not (inside / PROJECTIONS).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has no text encoder, so a text cannot be compared with its {encoder.bundle.noun}s; train one "
            "with the objective 'contrastive', or search for what is like a file."
        )
    try:
        with safe_open(inside / PROJECTIONS, framework="pt") as file:
            trained_with = json.loads((file.metadata() or {}).get("encoder", "{}"))
            projection, own = file.get_tensor("projection"), file.get_tensor("own")
        place: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        model = AutoModel.from_pretrained(inside, **place, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(inside, **place)
    except (OSError, ValueError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"The text encoder in {str(inside)!r} cannot be loaded: {reason_of(error)}") from error
    if trained_with != _fingerprint(encoder.model):
        raise CheckpointError(
            f"The text encoder in {str(inside)!r} was trained with another encoder than that in {str(folder)!r}; put back "
            "the one that belongs to it."
        )
    return TextReader(model, tokenizer, projection.numpy(), own)


def _fingerprint(encoder: Any) -> dict[str, str]:
    return dict(fingerprint_parts({f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}))
