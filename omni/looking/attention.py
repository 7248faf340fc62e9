"""Where a model looks: the encoder in an item, and the Thinker while it writes each word of an answer.

Shapes: H heads, n tokens of the encoder (CLS, registers if there are any, places), G the grid of places of an item: h x w
patches of a picture, N tokens of a sound in the order of time. W words of an answer, I items, L tokens of prompt and answer.

    encoder_attention(encoder, item)                 each head, their mean, rollout     float[H, *G], float[*G]
    word_attention(model, processor, items, text)    for each item, each word           I x float[W, *G]
    session_attention(session, text)                 the same in a `Session`

The weights are the model's own. They are taken with eager attention, also where the model otherwise runs with a fused
kernel. They say where information is read from. They do not say whether the answer uses it (Jain and Wallace, "Attention
is not Explanation", 2019).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.fusion.thinker import eager_attention
from omni.loading.encoder import Encoder
from omni.questions import Answer
from omni.registry import get_modality
from omni.session import Session

Floats = NDArray[np.float32]


class AttentionError(ValueError):
    """The attention cannot be shown. The message is one sentence."""


# --- The encoder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderAttention:
    """Where an encoder looks in one item.

    Attributes:
        layer, layers: the layer of these heads, counted from 1, and the number of layers.
        query: the token that looks: "CLS", or "all patches" (the mean of the grid's tokens) if the encoder has no CLS.
        heads: float[H, *G], the weight of each place. The rest to a sum of 1 lies on CLS and registers.
        rollout: float[*G], how much of each place has reached the query, over the layers from the first to this one.
    """

    layer: int
    layers: int
    query: str
    heads: Floats
    rollout: Floats

    @property
    def mean(self) -> Floats:
        """float[*G], the mean over the heads."""
        return self.heads.mean(0)


@torch.inference_mode()
def encoder_attention(encoder: Encoder, item: Any, layer: int | None = None) -> EncoderAttention:
    """The attention of CLS over the places of an item.

    Rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020) follows the attention down to the
    item. In each layer, half of a token comes from the token itself (the residual) and half from the mean of its heads.
    The matrices of the layers are multiplied.

    Args:
        encoder: see `omni.loading.encoder.load_encoder`. Its grid has to be its last tokens, as in omni's own encoders and
            in the towers of transformers. For a model in memory: `Encoder(model, preprocessor)`.
        item: of the encoder's modality, such as a picture or a sound.
        layer: counted from 1. The last layer by default.

    Raises:
        AttentionError: there is no such layer, the encoder returns no attention between its tokens, or it is in training
            mode.
    """
    model, name = encoder.model, type(encoder.model).__name__
    _expect_no_dropout(model)
    inputs = encoder.prepare([item])
    shape = encoder.grid_shape(inputs)
    places = math.prod(shape)
    arguments = {encoder.bundle.arguments[key]: value for key, value in inputs.items()}
    with eager_attention(model.config):
        encoded = model(**arguments, output_attentions=True)
    maps = encoded.get("attentions") or ()
    if not maps or any(
        each is None or each.ndim != 4 or not places <= each.shape[-2] == each.shape[-1] for each in maps
    ):
        raise AttentionError(
            f"{name} gives no maps of attention between its tokens, so none can be shown; choose another encoder."
        )
    layer = len(maps) if layer is None else layer
    if not 1 <= layer <= len(maps):
        raise AttentionError(f"{name} has layers 1 to {len(maps)}, found {layer}; choose one of them.")
    # the grid ends a sequence; if it is padded to the longest item that there can be, the item's own tokens begin it
    first = maps[0].shape[-1] - encoder.bundle.read(encoded, places)["grid"].shape[1]
    grid = slice(first, first + places)
    looking = slice(0, 1) if first else grid

    def over_places(weights: torch.Tensor) -> Floats:
        """[..., n, n] -> [..., *G], the rows of the tokens that look."""
        row = weights[..., looking, grid].float().mean(-2)
        return row.reshape(*row.shape[:-1], *shape).cpu().numpy()

    flow = torch.eye(maps[0].shape[-1], dtype=torch.float64, device=maps[0].device)
    itself = flow
    for each in maps[:layer]:
        flow = (each[0].double().mean(0) + itself) / 2 @ flow
    return EncoderAttention(
        layer=layer,
        layers=len(maps),
        query="CLS" if first else f"all {places_of(shape)}",
        heads=over_places(maps[layer - 1][0]),
        rollout=over_places(flow),
    )


def places_of(shape: Sequence[int]) -> str:
    """The noun for the places of a grid."""
    return "patches" if len(shape) == 2 else "tokens"


def _expect_no_dropout(model: torch.nn.Module) -> None:
    if model.training:
        raise AttentionError(
            f"{type(model).__name__} is in training mode, where dropout changes attention; call eval() first."
        )


# --- The Thinker ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordAttention:
    """Where the Thinker looks while it writes each word of an answer.

    The weights of a word add up to 1 over the grid and the CLS of every item, and the text.

    Attributes:
        answer: the answer, as `omni ask` gives it.
        words: the W words of the answer.
        maps: for each item float[W, *G], the weight of each place. Where the projector folds neighbours into one token,
            they share its weight equally. Of an item of which the Thinker gets CLS alone, float[W, 0].
        cls: float[I, W], the weight of each item's CLS token; 0 if it has none.
        text: float[W], the weight of the question and of the earlier words of the answer.
    """

    answer: Answer
    words: tuple[str, ...]
    maps: tuple[Floats, ...]
    cls: Floats
    text: Floats


class _Tokens(BaseStreamer):
    """Notes the tokens that `generate` reads and writes."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def word_attention(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    items: Sequence[Any],
    question: str,
    max_new_tokens: int = 192,
) -> WordAttention:
    """Ask, and see where the Thinker looks for each word of its answer.

    The Thinker chooses a token at the position before it, so the attention of that position is taken. A word is the mean
    over its tokens, and over all heads and layers. On scenes with one object, which covers 3.5 % of the patches, this mean
    puts 26 % of its weight on the object; the best single layer 31 %, the last layer 21 %, rollout through the Thinker 7 %
    (docs/attention.md). The mean also needs no choice of a layer for each Thinker.

    Args:
        model, processor: see `omni.loading.checkpoint.load`.
        items: one or more, or their files, in the order in which the question speaks of them.
        question, max_new_tokens: see `omni.session.Session.ask`.

    Raises:
        AttentionError: there is no item, the Thinker gets no tokens for the places of any, or returns no attention, or the
            model is in training mode.
        QuestionError: see `omni.session.Session.ask`.
    """
    return session_attention(Session(model, processor, items), question, max_new_tokens)


@torch.inference_mode()
def session_attention(session: Session, question: str, max_new_tokens: int = 192) -> WordAttention:
    """As `word_attention`, but items that the session has encoded are not encoded again."""
    model, sections = session.model, session.model.config.modalities
    _expect_no_dropout(model)
    if not session.items:
        raise AttentionError("Expected at least one item to look at, found none; pass one.")
    if not any("grid" in _parts(sections[item.modality]) for item in session.items):
        noun = get_modality(session.items[0].modality).noun
        raise AttentionError(
            f"The Thinker of this model gets only the CLS token of a {noun}, so it has no places to look at; choose a model "
            "whose projector reads the grid."
        )
    tokens = _Tokens()
    answer = session.ask(question, max_new_tokens, streamer=tokens)
    encoded: dict[str, list[Any]] = {}
    for item in session.items:
        encoded.setdefault(item.modality, []).append(item.value)
    ids, start = torch.tensor([tokens.ids], device=model.device), answer.tokens_read
    outputs = model.model(input_ids=ids, mm_encoder_outputs=encoded, output_attentions=True, use_cache=False)
    # layers without attention (states, convolutions) return None
    maps = [each[0].float().mean(0) for each in outputs.attentions or () if each is not None]
    if not maps:
        name = type(model.model.language_model).__name__
        raise AttentionError(f"{name} gives no maps of attention, so none can be shown; choose another language model.")
    by_token = torch.stack(maps).mean(0)[start - 1 : -1].cpu().numpy()  # float[tokens of the answer, L]
    words = _words(session.processor.tokenizer, tokens.ids[start:])
    by_word = np.array([by_token[members].mean(0) for _, members in words]).reshape(len(words), len(tokens.ids))
    # the tokens of an item follow one another, and those of the items of a modality stand in their order
    places = {name: np.flatnonzero(np.array(tokens.ids) == sections[name]["token_id"]) for name in encoded}
    everything, on_items = by_word.sum(1), by_word[:, np.concatenate([*places.values()])].sum(1)
    over_places, cls = [], np.zeros((len(session.items), len(words)), dtype=np.float32)
    for number, (name, item) in enumerate(session.items):
        mine, places[name] = np.split(places[name], [model.config.num_tokens(name, item.grid_shape)])
        if "cls" in _parts(sections[name]):  # CLS is the first token of an item
            cls[number], mine = by_word[:, mine[0]], mine[1:]
        shape = item.grid_shape if "grid" in _parts(sections[name]) else (0,)
        over_places.append(_unfold(by_word[:, mine], shape, sections[name]["factor"]))
    return WordAttention(
        answer=answer,
        words=tuple(word for word, _ in words),
        maps=tuple(over_places),
        cls=cls,
        text=everything - on_items,
    )


def _parts(section: Mapping[str, Any]) -> list[str]:
    """What the projector of a modality reads."""
    return str(section["output"]).split("+")


def _words(tokenizer: Any, written: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, split at spaces, each with the positions of its tokens. Special tokens belong to none."""
    texts = [tokenizer.decode(written[:end], skip_special_tokens=True) for end in range(len(written) + 1)]
    words: list[tuple[str, list[int]]] = [(word, []) for word in texts[-1].split()]
    for position, (before, after) in enumerate(pairwise(texts)):
        if before.strip() != after.strip():
            begun = len(after.split())
            for _, members in words[min(len(before.split()), begun - 1) : begun]:
                members.append(position)
    return words


def _unfold(cells: Floats, grid_shape: tuple[int, ...], factor: int) -> Floats:
    """float[W, number of tokens] -> float[W, *G]. The places that were folded into a token share its weight equally.

    Of one axis the last token may have folded fewer.
    """
    maps: Any = cells.reshape(len(cells), *(-(-side // factor) for side in grid_shape))
    for axis, side in enumerate(grid_shape, 1):
        owner = np.arange(side) // factor  # the token that each place went into
        members = np.bincount(owner)[owner]
        maps = maps.take(owner, axis) / members.reshape(-1, *[1] * (maps.ndim - 1 - axis))
    return np.asarray(maps, dtype=np.float32)
