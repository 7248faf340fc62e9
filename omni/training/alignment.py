"""Alignment: what a Thinker is given of a sound becomes what it would read of the words.

    sound -> tower -> projector -> tokens of the Thinker's width  ~  embeddings of the words that are said, or blank

Only tower and projector learn, so the language model is not run. Afterwards a sound looks to it like its transcript with
gaps, and it needs little training to answer by it (objective "answers").
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
from omni.training.answers import build_omni
from omni.training.recipe import OmniSection, Recipe
from omni.training.transcription import edits, sayings

AUDIO = "audio"
SHARPNESS = 12.0
"""What cosines are multiplied by before the softmax, at first."""
SIZE_WEIGHT = 0.1
"""Weight of the loss that keeps projected tokens as long as embeddings."""


class AlignmentModel(nn.Module):
    """A fused model without its head, and a blank, which training uses and `save` leaves out.

    The loss is that of connectionist temporal classification (Graves et al. 2006), on the cosines of projected tokens with
    the embeddings of all words, less their mean, and with a learnt blank. A second one keeps tokens as long as embeddings.
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
            slots: int64[I], tokens of each sound.
            labels: int64[I, L], the words, and `IGNORED` after the last one.

        Returns:
            `loss`, and `spelled` int64[I, N], the nearest word of each token; V, the number of words, for blank.
        """
        features = self.fused.get_features(AUDIO, audio_features=audio_features, audio_mask=audio_mask)
        tokens = nn.utils.rnn.pad_sequence(features.pooler_output, batch_first=True).float()
        words = self.fused.get_input_embeddings().weight.detach().float()
        blank, middle = len(words), words.mean(0)  # most of an embedding is common to all
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
    """The objective "alignment": the sounds of a fused model become like the words that are said. It saves the model.

    Raises:
        ExampleError: a transcript has more words than its sound has tokens.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, OmniSection)
        self.fused, self.processor = build_omni(**recipe.model.model_dump())
        self.model = AlignmentModel(
            self.fused.model
        )  # its head may be its embedding, and `Trainer` saves nothing twice
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
            needed = len(row) + sum(one == other for one, other in pairwise(row))  # a blank parts two of a kind
            if not row or needed > slots:
                raise ExampleError(
                    f"The transcript {text!r} has {len(row)} tokens, expected 1 to {slots}, what its sound becomes; leave "
                    "it out, or fold fewer tokens of the encoder together."
                )
        batch["labels"] = nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORED
        )
        return batch

    def spell(self, row: Sequence[int]) -> str:
        """The text of a row of `spelled`: words that repeat are one, blanks are none."""
        kept = [word for before, word in pairwise([self.blank, *row]) if word not in (before, self.blank, IGNORED)]
        text: str = self.processor.tokenizer.decode(kept)
        return text

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """`spelled`, unchanged, as it is small."""
        return logits

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Word error rate: words to change, add or take away, for each word that was said."""
        wrong = said = 0
        for spelled, row in zip(prediction.predictions, np.asarray(prediction.label_ids), strict=True):
            words = self.processor.tokenizer.decode(row[row != IGNORED]).split()
            wrong += edits(words, self.spell(spelled.tolist()).split())
            said += len(words)
        return {"word_error": wrong / max(said, 1)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """The fused model, whose projector of sounds is trained now, and the processor."""
        assert isinstance(model, AlignmentModel)
        self.fused.model = model.fused
        config: Any = self.fused.config
        config.untrained = [part for part in config.untrained or [] if part != f"{AUDIO}_projector"]
        vars(config).pop("use_cache", None)  # `Trainer` has set it, for itself
        self.fused.save_pretrained(folder)
        self.processor.save_pretrained(folder)
