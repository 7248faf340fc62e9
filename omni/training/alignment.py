"""Alignment: the projected tokens of a sound become like the embeddings of its transcript.

    sound -> tower -> projector -> tokens of the Thinker's width  ~  embeddings of the spoken words, or blank

Only tower and projector are trained, so the language model is not run. Afterwards a sound looks to the Thinker like its
transcript with gaps, and the Thinker needs little training to answer about it (objective "answers").
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EvalPrediction

from omni.data.collate import IGNORED
from omni.data.conversations import ExampleError
from omni.fusion.modeling_omni import OmniModel
from omni.registry import get_modality
from omni.training.fused import build_omni
from omni.training.recipe import Recipe
from omni.training.sections import OmniSection
from omni.training.transcription import edits, sayings

AUDIO = "audio"
SHARPNESS = 12.0
"""The initial factor on cosines before the softmax."""
SIZE_WEIGHT = 0.1
"""Weight of the loss that keeps the norms of projected tokens near those of embeddings."""


class AlignmentModel(nn.Module):
    """A fused model without its head, and a learnt blank, which only training uses.

    The loss is connectionist temporal classification (Graves et al. 2006). Its logits are the cosines of projected tokens
    with the blank and with the embeddings of all words, after the mean embedding is subtracted. A second loss keeps the
    norms of tokens near those of embeddings.
    """

    def __init__(self, fused: OmniModel) -> None:
        super().__init__()
        self.fused, self.config = fused, fused.config
        width = fused.get_input_embeddings().weight.shape[1]
        self.blank = nn.Parameter(torch.randn(width))
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))

    def forward(
        self, audio_features: torch.Tensor, audio_mask: torch.Tensor, slots: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Align I sounds, of which the longest becomes N tokens.

        Args:
            audio_features, audio_mask: float[I, F, M] and int[I, F].
            slots: int64[I], the number of tokens of each sound.
            labels: int64[I, L], the words, and `IGNORED` after the last one.

        Returns:
            `loss`, and `spelled` int64[I, N], the nearest word of each token, or V, the number of words, for blank.
        """
        features = self.fused.get_features(AUDIO, audio_features=audio_features, audio_mask=audio_mask)
        tokens = nn.utils.rnn.pad_sequence(features.pooler_output, batch_first=True).float()
        words = self.fused.get_input_embeddings().weight.detach().float()
        blank, middle = len(words), words.mean(0)  # embeddings have most in common
        directions = F.normalize(torch.cat([words - middle, self.blank[None]]), dim=-1)
        own = tokens - middle
        logits = self.sharpness * F.normalize(own, dim=-1) @ directions.T
        said = (labels != IGNORED).sum(1)
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), labels.clamp_min(0), slots, said, blank, reduction="sum"
        )
        heard = torch.arange(tokens.shape[1], device=tokens.device) < slots[:, None]
        sizes = own.norm(dim=-1)[heard] / (words - middle).norm(dim=-1).mean()
        spelled = logits.argmax(-1).masked_fill(~heard, blank)
        return {"loss": loss / slots.sum() + SIZE_WEIGHT * (sizes - 1).square().mean(), "spelled": spelled}


class Alignment:
    """The objective "alignment": the tokens of sounds become like those of the spoken words. It saves the fused model.

    Raises:
        ExampleError: a transcript has more words than its sound has tokens.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, OmniSection)
        self.fused, self.processor = build_omni(**recipe.model.model_dump())
        self.model = AlignmentModel(self.fused.model)  # no head: it may be tied, and `Trainer` saves no tensor twice
        self.blank = self.fused.config.text_config.vocab_size
        self.train, self.evaluate = sayings(recipe.train), sayings(recipe.evaluate)

    def collate(self, examples: Sequence[tuple[Any, str]]) -> dict[str, torch.Tensor]:
        """I sounds with transcripts -> `audio_features`, `audio_mask`, `slots` int64[I] and `labels` int64[I, L]."""
        sounds, texts = zip(*examples, strict=True)
        bundle = get_modality(AUDIO)
        assert bundle.prepare is not None
        batch = dict(bundle.prepare(self.processor.preprocessors[AUDIO], sounds, {"return_tensors": "pt"}))
        shapes = bundle.grid_shapes(self.model.config.modalities[AUDIO]["encoder"], batch)
        batch["slots"] = torch.tensor([self.model.config.num_tokens(AUDIO, shape) for shape in shapes])
        rows = self.processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for text, row, slots in zip(texts, rows, batch["slots"].tolist(), strict=True):
            needed = len(row) + sum(one == other for one, other in pairwise(row))  # a blank between equal neighbours
            if not row or needed > slots:
                raise ExampleError(
                    f"The transcript {text!r} has {len(row)} tokens, expected 1 to {slots}, the tokens of its sound; leave "
                    "it out, or fold fewer tokens of the encoder together."
                )
        batch["labels"] = nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORED
        )
        return batch

    def spell(self, row: Sequence[int]) -> str:
        """The text of a row of `spelled`: repeated words are merged, then blanks are removed."""
        kept = [word for before, word in pairwise([self.blank, *row]) if word not in (before, self.blank, IGNORED)]
        text: str = self.processor.tokenizer.decode(kept)
        return text

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """`spelled` int64[I, N], unchanged."""
        return logits

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Word error rate: edits (substitutions, insertions, deletions) per spoken word."""
        wrong = said = 0
        for spelled, row in zip(prediction.predictions, np.asarray(prediction.label_ids), strict=True):
            words = self.processor.tokenizer.decode(row[row != IGNORED]).split()
            wrong += edits(words, self.spell(spelled.tolist()).split())
            said += len(words)
        return {"word_error": wrong / max(said, 1)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the fused model, whose audio projector is trained, and the processor."""
        assert isinstance(model, AlignmentModel)
        self.fused.model = model.fused
        config: Any = self.fused.config
        config.untrained = [part for part in config.untrained or [] if part != f"{AUDIO}_projector"]
        vars(config).pop("use_cache", None)  # a setting of `Trainer`
        self.fused.save_pretrained(folder)
        self.processor.save_pretrained(folder)
