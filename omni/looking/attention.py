"""Where a model looks: the encoder in a picture, and the Thinker while it writes each word of an answer.

Shapes: H heads, n tokens of the encoder (CLS, registers if there are any, patches), h x w patches of a picture, W words of
an answer, I pictures, L tokens of prompt and answer.

    encoder_attention(encoder, picture)                 each head, their mean, rollout     float[H, h, w], float[h, w]
    word_attention(model, processor, pictures, text)    for each picture, each word        I x float[W, h, w]
    session_attention(session, text)                    the same in a `Session`

The weights are the model's own. They are taken with eager attention, also where the model otherwise runs with a fused
kernel. They say where information is read from. They do not say whether the answer uses it (Jain and Wallace, "Attention
is not Explanation", 2019).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.fusion.thinker import eager_attention
from omni.loading.encoder import Encoder
from omni.session import Answer, Session

Floats = NDArray[np.float32]


class AttentionError(ValueError):
    """The attention cannot be shown. The message is one sentence."""


# --- The encoder ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncoderAttention:
    """Where an encoder looks in one picture.

    Attributes:
        layer, layers: the layer of these heads, counted from 1, and the number of layers.
        query: the token that looks: "CLS", or "all patches" (their mean) if the encoder has no CLS.
        heads: float[H, h, w], the weight of each patch. The rest to a sum of 1 lies on CLS and registers.
        rollout: float[h, w], how much of each patch has reached the query, over the layers from the first to this one.
    """

    layer: int
    layers: int
    query: str
    heads: Floats
    rollout: Floats

    @property
    def mean(self) -> Floats:
        """float[h, w], the mean over the heads."""
        return self.heads.mean(0)


@torch.inference_mode()
def encoder_attention(encoder: Encoder, picture: Image.Image, layer: int | None = None) -> EncoderAttention:
    """The attention of CLS over the patches of a picture.

    Rollout (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020) follows the attention down to the
    picture. In each layer, half of a token comes from the token itself (the residual) and half from the mean of its heads.
    The matrices of the layers are multiplied.

    Args:
        encoder: see `omni.loading.encoder.load_encoder`. Its patches have to be its last tokens, as in omni's own encoder
            and in the vision towers of transformers. For a model in memory: `Encoder(model, preprocessor)`.
        picture: see `omni.vision.pictures.read_picture`.
        layer: counted from 1. The last layer by default.

    Raises:
        AttentionError: there is no such layer, the encoder returns no attention between its tokens, or it is in training
            mode.
    """
    model, name = encoder.model, type(encoder.model).__name__
    _expect_no_dropout(model)
    inputs = encoder.prepare([picture])
    shape = encoder.grid_shape(inputs)
    patches = math.prod(shape)
    with eager_attention(model.config):
        maps = model(**inputs, output_attentions=True).get("attentions") or ()
    if not maps or any(
        each is None or each.ndim != 4 or not patches <= each.shape[-2] == each.shape[-1] for each in maps
    ):
        raise AttentionError(
            f"{name} gives no maps of attention between its tokens, so none can be shown; choose another encoder."
        )
    layer = len(maps) if layer is None else layer
    if not 1 <= layer <= len(maps):
        raise AttentionError(f"{name} has layers 1 to {len(maps)}, found {layer}; choose one of them.")
    has_cls = maps[0].shape[-1] > patches
    looking = slice(0, 1) if has_cls else slice(None)

    def over_patches(weights: torch.Tensor) -> Floats:
        """[..., n, n] -> [..., h, w], the rows of the tokens that look."""
        row = weights[..., looking, -patches:].float().mean(-2)
        return row.reshape(*row.shape[:-1], *shape).cpu().numpy()

    flow = torch.eye(maps[0].shape[-1], dtype=torch.float64, device=maps[0].device)
    itself = flow
    for each in maps[:layer]:
        flow = (each[0].double().mean(0) + itself) / 2 @ flow
    return EncoderAttention(
        layer=layer,
        layers=len(maps),
        query="CLS" if has_cls else "all patches",
        heads=over_patches(maps[layer - 1][0]),
        rollout=over_patches(flow),
    )


def _expect_no_dropout(model: torch.nn.Module) -> None:
    if model.training:
        raise AttentionError(
            f"{type(model).__name__} is in training mode, where dropout changes attention; call eval() first."
        )


# --- The Thinker ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordAttention:
    """Where the Thinker looks while it writes each word of an answer.

    The weights of a word add up to 1 over the patches and the CLS of every picture, and the text.

    Attributes:
        answer: the answer, as `omni ask` gives it.
        words: the W words of the answer.
        maps: for each picture float[W, h, w], the weight of each patch. Where the projector folds k x k patches into one
            token, they share its weight equally.
        cls: float[I, W], the weight of each picture's CLS token; 0 if pictures have none.
        text: float[W], the weight of the question and of the earlier words of the answer.
    """

    answer: Answer
    words: tuple[str, ...]
    maps: tuple[Floats, ...]
    cls: Floats
    text: Floats


class _Tokens(BaseStreamer):
    """Keeps the tokens that `generate` reads and writes."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def word_attention(
    model: OmniForConditionalGeneration,
    processor: OmniProcessor,
    pictures: Sequence[Image.Image],
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
        pictures: one or more, in the order in which the question speaks of them.
        question, max_new_tokens: see `omni.session.Session.ask`.

    Raises:
        AttentionError: there is no picture, the Thinker gets no tokens for the places of a picture or returns no
            attention, or the model is in training mode.
        QuestionError: see `omni.session.Session.ask`.
    """
    return session_attention(Session(model, processor, pictures), question, max_new_tokens)


@torch.inference_mode()
def session_attention(session: Session, question: str, max_new_tokens: int = 192) -> WordAttention:
    """The same as `word_attention`. Pictures that the session has encoded are not encoded again."""
    model = session.model
    _expect_no_dropout(model)
    if not session.count:
        raise AttentionError("Expected at least one picture to look at, found none; pass one.")
    section = model.config.modalities.get("image")
    if section is None or "grid" not in section["output"].split("+"):
        given = "no pictures" if section is None else "only the CLS token of a picture"
        raise AttentionError(
            f"The Thinker of this model gets {given}, so it has no places to look at; choose a model whose projector reads "
            "the grid."
        )
    tokens = _Tokens()
    answer = session.ask(question, max_new_tokens, streamer=tokens)
    items = [value for _, value in session.items]
    ids, start = torch.tensor([tokens.ids], device=model.device), answer.tokens_read
    outputs = model.model(input_ids=ids, mm_encoder_outputs={"image": items}, output_attentions=True, use_cache=False)
    # layers without attention (states, convolutions) return None
    maps = [each[0].float().mean(0) for each in outputs.attentions or () if each is not None]
    if not maps:
        name = type(model.model.language_model).__name__
        raise AttentionError(f"{name} gives no maps of attention, so none can be shown; choose another language model.")
    by_token = torch.stack(maps).mean(0)[start - 1 : -1].cpu().numpy()  # float[tokens of the answer, L]
    words = _words(session.processor.tokenizer, tokens.ids[start:])
    by_word = np.array([by_token[members].mean(0) for _, members in words]).reshape(len(words), len(tokens.ids))
    here = np.flatnonzero(np.array(tokens.ids) == section["token_id"])
    ends = np.cumsum([model.config.num_tokens("image", item.grid_shape) for item in items])
    over_patches, cls = [], np.zeros((len(items), len(words)), dtype=np.float32)
    for number, (item, mine) in enumerate(zip(items, np.split(here, ends[:-1]), strict=True)):
        if "cls" in section["output"].split("+"):  # CLS is the first token of a picture
            cls[number], mine = by_word[:, mine[0]], mine[1:]
        over_patches.append(_unfold(by_word[:, mine], item.grid_shape, section["factor"]))
    everything = by_word.sum(1)
    return WordAttention(
        answer=answer,
        words=tuple(word for word, _ in words),
        maps=tuple(over_patches),
        cls=cls,
        text=everything - by_word[:, here].sum(1),
    )


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
    """float[W, N / k**2] -> float[W, h, w]: the patches that were folded into a token share its weight equally."""
    maps = cells.reshape(len(cells), *(side // factor for side in grid_shape))
    for axis in range(1, 1 + len(grid_shape)):
        maps = maps.repeat(factor, axis)
    return (maps / factor ** len(grid_shape)).astype(np.float32)
