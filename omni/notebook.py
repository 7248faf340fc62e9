"""omni in Python and in notebooks: load a checkpoint, ask about files, turn files into vectors.

    model = omni.load("checkpoints/omni_tiny")
    model.ask("examples/scene.png", "what color is the circle")  # a `Reply`; a notebook shows the picture beside it
    model.embed(["examples/scene.png", "examples/second.png"])   # float32[2, D]

`omni.ask` and `omni.embed` do the same in one call.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from omni.checkpoints.folder import CheckpointError, model_type_of, prompt_of
from omni.embedding.engine import Engine
from omni.fusion.configuration_omni import OmniConfig
from omni.items import Item, expect_known, nouns, read_items
from omni.loading import checkpoint
from omni.loading.encoder import Encoder, load_encoder
from omni.looking.attention import encoder_attention, word_attention
from omni.looking.panels import draw_encoder, draw_words
from omni.modality import ItemError
from omni.questions import Answer
from omni.registry import get_modality
from omni.session import Session

LARGEST = 320
"""Pixels of the longer side of a picture in a notebook."""

_BATCH = 32


@dataclass(frozen=True)
class Reply:
    """A model's answer about items. `print` writes the answer; a notebook also shows the items.

    Attributes:
        answer: the text.
        question: the question.
        items: the items that it is about.
        details: lengths, times, and whether the model ended by itself.
    """

    answer: str
    question: str
    items: Sequence[Item]
    details: Answer

    @property
    def confidence(self) -> float | None:
        """The probability that the answer is right; None if the checkpoint does not know it."""
        return self.details.confidence

    @property
    def note(self) -> str | None:
        """A sentence about items or a question that are unlike training; None if there are none, or if it is not known."""
        familiar = self.details.familiar
        return None if familiar is None else familiar.note([item.modality for item in self.items])

    def __str__(self) -> str:
        return self.answer

    def __repr__(self) -> str:
        about = f", about {nouns(self.items)}" if self.items else ""
        sure = "" if self.confidence is None else f", sure to {self.confidence:.2f}"
        return f"Reply({self.answer!r} to {self.question!r}{about}{sure})"

    def _repr_html_(self) -> str:
        shown = "".join(map(_drawn, self.items))
        remarks = [] if self.details.complete else ["cut at its longest"]
        remarks += [] if self.confidence is None else [f"sure to {self.confidence:.2f}"]
        remarks += [self.note] if self.note else []
        below = f" <small>{escape('; '.join(remarks))}</small>" if remarks else ""
        return (
            f"<div>{shown}<p style='margin:.3em 0'>{escape(self.question)}</p>"
            f"<p style='margin:.3em 0'><strong>{escape(self.answer)}</strong>{below}</p></div>"
        )


class Loaded:
    """A loaded checkpoint: a fused model, which answers and embeds, or an encoder, which embeds.

    Attributes:
        folder: its folder.
        modalities: the names of the modalities that it takes beside text.
        model, processor: the fused model and its processor, or the encoder and its preprocessor.
    """

    model: Any
    processor: Any
    modalities: list[str]

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.fused = model_type_of(self.folder) == OmniConfig.model_type
        self._encoder: Encoder | None = None
        self._engines: dict[str, Engine] = {}
        if self.fused:
            self.model, self.processor = checkpoint.load(self.folder)
            self.modalities = list(self.model.config.modalities)
        else:
            self._encoder = load_encoder(self.folder)
            self.model, self.processor = self._encoder.model, self._encoder.preprocessor
            self.modalities = [self._encoder.modality]

    def ask(self, items: Any = (), question: str | None = None, max_new_tokens: int = 192) -> Reply:
        """Ask about items: `ask("photo.jpg", "what is it?")`.

        Args:
            items: an item or a file, or a list of them, in the order in which the question refers to them.
            question: by default the most common question of training.
            max_new_tokens: the largest length of the answer.

        Raises:
            CheckpointError: this is an encoder, which does not answer.
            QuestionError: the question cannot be asked.
            ItemError: a file cannot be read.
        """
        if not self.fused:
            raise CheckpointError(f"{str(self.folder)!r} holds an encoder, expected a model that answers; use `embed`.")
        opened = read_items(_listed(items))
        asked = (prompt_of(self.folder) or "") if question is None else question
        details = Session(self.model, self.processor, opened).ask(asked, max_new_tokens)
        return Reply(details.answer, details.question, opened, details)

    def attend(self, items: Any, question: str | None = None) -> Image.Image:
        """Attention drawn over the items: of a fused model for each word of its answer, or of an encoder for one item.

        Raises:
            QuestionError: the question cannot be asked.
            AttentionError: the model returns no attention maps.
            ItemError: a file cannot be read.
        """
        opened = read_items(_listed(items))
        if self._encoder is not None:
            (item,) = opened
            return draw_encoder(encoder_attention(self._encoder, item.value, None), self._encoder, item.value)
        asked = (prompt_of(self.folder) or "") if question is None else question
        return draw_words(word_attention(self.model, self.processor, opened, asked), self.processor, opened)

    def session(self, items: Any) -> Session:
        """A session for several questions about the same items, which are encoded once."""
        return Session(self.model, self.processor, _listed(items))

    def embed(self, files: Any, normalize: bool = False) -> NDArray[np.float32]:
        """Vectors float32[N, D] of N items or files of one modality, as in `omni embed`; float32[D] of a single one.

        Args:
            files: an item or a file, or a list of them.
            normalize: divide each vector by its norm.

        Raises:
            ItemError: a file cannot be read, or there are items of several modalities or of another one.
            EngineError: the encoder has no vector for a whole item.
        """
        items = read_items(_listed(files))
        expect_known(items, self.modalities)
        names = {item.modality for item in items}
        if len(names) != 1:
            found = nouns(items) or "nothing"
            raise ItemError(f"Expected items of one modality, found {found}; embed those of each modality separately.")
        engine = self._engine(names.pop())
        values = [engine.prepare(item.value) for item in items]
        parts = [values[start : start + _BATCH] for start in range(0, len(values), _BATCH)]
        vectors = np.concatenate([row for part in parts for row in engine(part)])
        if normalize:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors if isinstance(files, list | tuple) else vectors[0]

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            encoder = self._encoder or Encoder(
                getattr(self.model.model, f"{name}_tower"), self.processor.preprocessors[name], modality=name
            )
            self._engines[name] = Engine(encoder, "cls")
        return self._engines[name]

    def __repr__(self) -> str:
        takes = " and ".join(f"{get_modality(name).noun}s" for name in self.modalities)
        what = f"a model that answers about {takes or 'text'}" if self.fused else f"an encoder of {takes}"
        return f"Loaded({str(self.folder)!r}: {what}, {sum(p.numel() for p in self.model.parameters()):,} parameters)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>"


def load(folder: str | Path) -> Loaded:
    """Load a checkpoint, a fused model or an encoder. Nothing is downloaded.

    Raises:
        CheckpointError: the folder does not exist, or holds nothing that can be loaded.
    """
    return Loaded(folder)


def ask(items: Any, question: str | None, model: str | Path | Loaded, max_new_tokens: int = 192) -> Reply:
    """Ask a model or the model in a folder: `omni.ask("photo.jpg", "what is it?", "checkpoints/omni_tiny")`.

    See `Loaded.ask`.
    """
    return _loaded(model).ask(items, question, max_new_tokens)


def embed(files: Any, model: str | Path | Loaded, normalize: bool = False) -> NDArray[np.float32]:
    """Vectors float32[N, D] of N items or files of one modality: `omni.embed(["a.png"], "checkpoints/vision_tiny")`.

    See `Loaded.embed`. For a table of many files, use `omni.embedding.embed`.
    """
    return _loaded(model).embed(files, normalize)


def _loaded(model: str | Path | Loaded) -> Loaded:
    return model if isinstance(model, Loaded) else Loaded(model)


def _listed(items: Any) -> list[Any]:
    """A list of items, from one item or several. An `Item` is one, although it is a tuple."""
    return list(items) if isinstance(items, list | tuple) and not isinstance(items, Item) else [items]


def _drawn(item: Item) -> str:
    """An item as HTML, as its modality shows it."""
    modality = get_modality(item.modality)
    if modality.show is None:
        return f"<p>({escape(modality.noun)})</p>"
    picture = modality.show(item.value).convert("RGB")
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img src="{uri}" alt="{escape(modality.noun)}" style="margin:2px">'
