"""Transcription: an encoder of sounds learns to spell what is said in them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from omni.data.collate import IGNORED
from omni.data.conversations import ExampleError
from omni.data.manifests import Manifest, ManifestConversations
from omni.registry import get_modality
from omni.training.encoder import build_encoder
from omni.training.order import mix
from omni.training.recipe import Recipe
from omni.training.sections import Drawn, EncoderSection, Files, Mixture

SLOTS = 3
"""Letters that one token can spell. With tokens of 80 ms this makes 37 letters per second; people speak 10 to 25."""

BLANK = 0

MOST_TRANSCRIPTS = 20_000
"""The largest number of transcripts that are read for the alphabet."""

HIDDEN_BANDS, HIDDEN_FRAMES = 0.15, 0.06
"""The largest share of the bands and of the frames that is hidden at a time. Each is hidden twice."""


class SpellingModel(nn.Module):
    """An encoder with a head that spells. Only training uses the head.

    The loss is connectionist temporal classification (Graves et al. 2006), which needs no times of letters. Each token has
    `SLOTS` slots, each for a letter or a blank. During training some bands and frames are hidden (Park et al. 2019,
    "SpecAugment").

    Args:
        encoder: reads `input_features` and `attention_mask`; its output has `grid` float[I, N, D].
        letters: number of letters in the alphabet.
    """

    def __init__(self, encoder: PreTrainedModel, letters: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, SLOTS * (1 + letters))

    def forward(
        self, audio_features: torch.Tensor, audio_mask: torch.Tensor, slots: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, Any]:
        """Spell I sounds, of which the longest has N tokens.

        Args:
            audio_features, audio_mask: float[I, F, M] and int[I, F].
            slots: int64[I], the number of slots of each sound.
            labels: int64[I, L], letters from 1 on, and `IGNORED` after the last one.

        Returns:
            `loss`, the mean over slots, and `spelled` int64[I, SLOTS * N], the likeliest letter of each slot or `BLANK`.
        """
        heard = self._hidden(audio_features) if self.training else audio_features
        grid = self.encoder(input_features=heard, attention_mask=audio_mask).grid
        logits = rearrange(self.head(grid), "i n (s k) -> i (n s) k", s=SLOTS).float()
        letters = (labels != IGNORED).sum(1)
        loss = F.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1), labels.clamp_min(BLANK), slots, letters, BLANK, reduction="sum"
        )
        spelled = logits.argmax(-1)
        spelled[torch.arange(spelled.shape[1], device=spelled.device) >= slots[:, None]] = BLANK
        return {"loss": loss / slots.sum(), "spelled": spelled}

    def _hidden(self, features: torch.Tensor) -> torch.Tensor:
        for axis, part in ((1, HIDDEN_FRAMES), (2, HIDDEN_BANDS)) * 2:
            size = features.shape[axis]
            place = torch.arange(size, device=features.device)
            start, length = (torch.rand(2, len(features), 1, device=features.device) * size).floor()
            hidden = (place >= start) & (place < start + length * part)
            features = features.masked_fill(hidden.unsqueeze(3 - axis), 0)
        return features


class Transcription:
    """The objective "transcription": the encoder of a sound spells the first answer about it. Only the encoder is saved.

    Raises:
        ExampleError: a transcript has letters outside of the alphabet, or more letters than its sound has slots.
    """

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.model, EncoderSection)
        self.bundle = get_modality("audio")
        encoder, self.processor = build_encoder(recipe.model, self.bundle.name)
        self.train, self.evaluate = sayings(recipe.train), sayings(recipe.evaluate)
        count = min(len(self.train), MOST_TRANSCRIPTS)
        self.alphabet = "".join(
            sorted({letter for i in range(count) for letter in self.train.transcript(i).casefold()})
        )
        self.model = SpellingModel(encoder, len(self.alphabet))

    def collate(self, examples: Sequence[tuple[Any, str]]) -> dict[str, torch.Tensor]:
        """I sounds with transcripts -> `audio_features`, `audio_mask`, `slots` int64[I] and `labels` int64[I, L]."""
        sounds, texts = zip(*examples, strict=True)
        assert self.bundle.prepare is not None
        batch = dict(self.bundle.prepare(self.processor, sounds, {"return_tensors": "pt"}))
        shapes = self.bundle.grid_shapes(self.model.encoder.config, batch)
        batch["slots"] = torch.tensor([SLOTS * tokens for (tokens,) in shapes])
        rows = []
        for text, slots in zip(texts, batch["slots"].tolist(), strict=True):
            letters = text.casefold()
            if strange := sorted(set(letters) - set(self.alphabet)):
                raise ExampleError(
                    f"The transcript {text!r} has {strange}, which the first {MOST_TRANSCRIPTS:,} transcripts do not have."
                )
            needed = len(letters) + sum(
                one == other for one, other in pairwise(letters)
            )  # a blank between equal neighbours
            if not letters or needed > slots:
                raise ExampleError(
                    f"The transcript {text!r} has {len(letters)} letters, expected 1 to about {slots}, as many as the sound "
                    "has time for; check that they belong together."
                )
            rows.append(torch.tensor([1 + self.alphabet.index(letter) for letter in letters]))
        batch["labels"] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return batch

    def spell(self, slots: Sequence[int]) -> str:
        """The text of a row of slots: repeated letters are merged, then blanks are removed."""
        kept = [slot for before, slot in pairwise([BLANK, *slots]) if slot not in (before, BLANK, IGNORED)]
        return "".join(self.alphabet[slot - 1] for slot in kept)

    def reduce_logits(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """`spelled` int64[I, SLOTS * N], unchanged."""
        return logits

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Word error rate: edits (substitutions, insertions, deletions) per spoken word."""
        wrong = said = 0
        for slots, letters in zip(prediction.predictions, np.asarray(prediction.label_ids), strict=True):
            words = "".join(self.alphabet[letter - 1] for letter in letters[letters != IGNORED]).split()
            wrong += edits(words, self.spell(slots.tolist()).split())
            said += len(words)
        return {"word_error": wrong / max(said, 1)}

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the encoder and its feature extractor."""
        assert isinstance(model, SpellingModel)
        model.encoder.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def edits(expected: Sequence[str], found: Sequence[str]) -> int:
    """The smallest number of substitutions, insertions and deletions between two lists of words (Levenshtein 1966)."""
    row = list(range(len(found) + 1))
    for i, wanted in enumerate(expected, start=1):
        before, row[0] = row[0], i
        for j, given in enumerate(found, start=1):
            before, row[j] = row[j], min(before + (wanted != given), row[j] + 1, row[j - 1] + 1)
    return row[-1]


class ManifestSayings(torch.utils.data.Dataset[tuple[Any, str]]):
    """For each row of a manifest its one sound and the first answer about it.

    Raises:
        ExampleError: on access to a row with no sound or several sounds.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.examples = manifest, ManifestConversations(manifest)
        self.blocks = manifest.blocks

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        sounds = self.examples[index].items.get("audio", [])
        if len(sounds) != 1:
            raise ExampleError(
                f"{self.manifest[index].source} has {len(sounds)} sounds; transcription needs exactly one."
            )
        return sounds[0], self.transcript(index)

    def lengths(self) -> list[int]:
        """The number of letters of each transcript, by which `OmniTrainer` groups examples into batches."""
        return [len(self.transcript(index)) for index in range(len(self))]

    def transcript(self, index: int) -> str:
        """The transcript of a row. The sound is not opened."""
        return self.manifest[index].answer


def sayings(data: Drawn | Files | Mixture | None) -> Any:
    """A sequence of (sound, transcript), from files or from a world; None for None."""
    if data is None:
        return None
    return mix(data, lambda part: ManifestSayings(part.manifest()) if isinstance(part, Files) else part.sayings())
