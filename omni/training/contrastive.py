"""Contrastive alignment of an encoder: embeddings of a picture and its caption move together, all others apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    EvalPrediction,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.models.clip.modeling_clip import CLIPOutput

from omni.data.collate import expect_taken
from omni.data.conversations import ExampleError
from omni.data.manifests import Manifest
from omni.loading.text import save_text
from omni.training.encoder import build_encoder
from omni.training.order import mix
from omni.training.recipe import Recipe, said_by_recipe
from omni.training.sections import ContrastiveSection, Drawn, Files, Mixture
from omni.training.tokenizer import train_tokenizer

MOST_CAPTIONS = 20_000
"""The largest number of captions that are read to train the tokenizer."""


class ContrastiveAlignment:
    """The objective "contrastive": the symmetric InfoNCE loss with a learnt temperature (Radford et al. 2021).

    It compares the CLS token with the embedding of a caption. The model is transformers' `VisionTextDualEncoderModel` with
    omni's encoder. Negatives are the other pictures and captions in the batch of one process, see `CaptionedPicturesModel`.

    Raises:
        ExampleError: all pictures have the same caption.
    """

    def __init__(self, recipe: Recipe) -> None:
        section = recipe.model
        assert isinstance(section, ContrastiveSection)
        encoder, self.processor = build_encoder(section)
        self.train = captions(recipe.train)
        self.evaluate = captions(recipe.evaluate) if recipe.evaluate else None
        count = min(len(self.train), MOST_CAPTIONS)
        read = [self.train.caption(i) for i in range(count)]
        if len(set(read)) < 2:
            raise ExampleError(
                f"All {count} pictures have the caption {read[0]!r}, but the contrastive loss needs captions that tell "
                "pictures apart; make them richer."
            )
        tokenizer = train_tokenizer(read, section.vocab_size, {})
        with said_by_recipe("model.text", section.text):
            text = AutoConfig.for_model(**section.text, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            encoder.config, text, projection_dim=section.projection_dim
        )
        self.model = CaptionedPicturesModel(config, vision_model=encoder, text_model=AutoModel.from_config(text))
        self.tokenizer = tokenizer

    def collate(self, examples: Sequence[tuple[Any, str]]) -> dict[str, Any]:
        """B pictures with captions -> `pixel_values`, `input_ids`, `attention_mask` and `return_loss`."""
        pictures, texts = zip(*examples, strict=True)
        # padding on the right, so that a word's position does not depend on the other captions
        words = self.tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
        return {**self.processor(list(pictures), return_tensors="pt"), **words, "return_loss": True}

    def reduce_logits(self, logits: Any, labels: Any) -> torch.Tensor:
        """The embeddings of B pictures and of their captions, float[B, 2, D]."""
        text_embeds, image_embeds = logits[2], logits[3]
        return torch.stack([image_embeds, text_embeds], dim=1).float()

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Recall at 1 and 5 among all pictures and captions of the evaluation, in both directions."""
        images, texts = np.asarray(prediction.predictions).transpose(1, 0, 2)
        similarity = images @ texts.T  # (n, n)
        found: dict[str, float] = {}
        for name, table in (("text_of_image", similarity), ("image_of_text", similarity.T)):
            rank = (table > np.diag(table)[:, None]).sum(1)
            found |= {f"{name}_at_{k}": float((rank < k).mean()) for k in (1, 5)}
        return found

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the encoder and its image processor, and beside them the text encoder, which finds pictures by words."""
        assert isinstance(model, VisionTextDualEncoderModel)
        model.vision_model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        sides = (model.visual_projection.weight, model.text_projection.weight)
        save_text(folder, model.vision_model, model.text_model, self.tokenizer, *sides)


class CaptionedPicturesModel(VisionTextDualEncoderModel):
    """A dual encoder whose loss does not count pictures with equal captions as negatives of each other.

    Otherwise the loss would push a picture away from its own caption.
    """

    def forward(
        self, input_ids: torch.Tensor, *args: Any, return_loss: bool | None = None, **kwargs: Any
    ) -> CLIPOutput:
        """As `VisionTextDualEncoderModel.forward`, for captions int64[B, L] and B pictures."""
        output: CLIPOutput = super().forward(input_ids, *args, return_loss=False, return_dict=True, **kwargs)
        if return_loss:
            same = (input_ids[:, None] == input_ids).all(-1).fill_diagonal_(False)
            logits = output.logits_per_text.masked_fill(same, -torch.inf)
            own = torch.arange(len(logits), device=logits.device)
            output.loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return output


class ManifestCaptions(torch.utils.data.Dataset[tuple[Image.Image, str]]):
    """For each row of a manifest its one picture and the first answer about it.

    Raises:
        ExampleError: on access to a row with no picture, several pictures, or an item of another modality.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.blocks = manifest, manifest.blocks

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        row = self.manifest[index]
        expect_taken(row.source, [file.modality for file in row.files], ["image"])
        if len(row.files) != 1:
            raise ExampleError(f"{row.source} has {len(row.files)} pictures; contrastive training needs exactly one.")
        return row.open()["image"][0], self.caption(index)

    def caption(self, index: int) -> str:
        """The caption of a row. The picture is not opened."""
        return self.manifest[index].answer


def captions(data: Drawn | Files | Mixture) -> Any:
    """A sequence of (picture, caption), from files or from a world."""
    return mix(data, lambda part: ManifestCaptions(part.manifest()) if isinstance(part, Files) else part.captions())
