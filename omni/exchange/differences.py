"""Run ONNX graphs in onnxruntime, and compare them with the model that they were made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from omni.exchange.graphs import random_words
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.signature import CACHE
from omni.loading.encoder import Encoder


def _note(found: dict[str, float], name: str, ours: Any, theirs: torch.Tensor) -> None:
    """Keep the largest difference of a graph from the model."""
    expected = theirs.detach().numpy()
    apart = float(np.abs(ours - expected).max() / max(1.0, float(np.abs(expected).max())))
    found[name] = max(found.get(name, 0.0), apart) if apart == apart else apart


def compare_encoder(folder: Path, encoder: Encoder, probes: Sequence[Any], found: dict[str, float]) -> None:
    """The largest differences of an encoder's graphs, of one item and of several at once, from the model's of one at a time.

    Other numbers of items, and others of several lengths, are tried than traced.
    """
    name = encoder.modality
    encode = open_session(folder / f"{name}_encoder.onnx")
    for items in (probes[:1], probes[1:]):
        inputs = {key: value.numpy() for key, value in encoder.prepare(items).items()}
        encoded = _run(encode, {each.name: inputs[each.name] for each in encode.get_inputs()})
        projected = None
        if encoder.fused is not None:
            parts = encoder.fused.config.modalities[name]["output"].split("+")
            projected = _run(open_session(folder / f"{name}_projector.onnx"), {part: encoded[part] for part in parts})[
                "tokens"
            ]
        for row, item in enumerate(items):
            alone = encoder.prepare([item])
            expected, shapes = encoder.encode(alone), encoder.grid_shapes(alone)
            for part in encoded:
                (count,) = encoder.counts(part, shapes)
                _note(found, f"{name}_encoder", encoded[part][row, :count], expected[part][0, :count])
            if projected is not None:
                (count,) = encoder.counts("projected", shapes)
                _note(found, f"{name}_projector", projected[row, :count], expected["projected"][0])


@torch.no_grad()
def compare_thinker(folder: Path, model: OmniForConditionalGeneration, found: dict[str, float]) -> None:
    """Compare prompts of one row, and of two rows where one is padded on the left; then token after token."""
    embed, think = open_session(folder / "embedding.onnx"), open_session(folder / "thinker.onnx")
    ids = torch.arange(min(8, model.config.text_config.vocab_size))[None]
    _note(
        found, "embedding", _run(embed, {"input_ids": ids.numpy()})["inputs_embeds"], model.get_input_embeddings()(ids)
    )
    for rows, length in ((1, 7), (2, 12)):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1:, :4] = 0
        cache, past = DynamicCache(), _empty_past(think, rows)
        for step in range(3):
            embeds = random_words(model, rows, length if step == 0 else 1)
            expected = model(inputs_embeds=embeds, attention_mask=mask, **{CACHE: cache})
            cache = expected[CACHE]
            inputs = {"inputs_embeds": embeds.numpy(), "attention_mask": mask.numpy(), **past}
            outputs = _run(think, inputs)
            _note(found, "thinker", outputs["logits"][:, -1], expected.logits[:, -1])
            past = {name: outputs[name.replace("input.", "output.", 1)] for name in past}
            mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.int64)], dim=1)


def _empty_past(session: Any, rows: int) -> dict[str, np.ndarray]:
    """Keys and values of zero tokens, float[B, h, 0, d] each, to start with."""
    past = [each for each in session.get_inputs() if each.name.startswith(f"input.{CACHE}")]
    return {each.name: np.zeros((rows, int(each.shape[1]), 0, int(each.shape[3])), np.float32) for each in past}


def open_session(path: Path) -> Any:
    """A graph in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))
