"""Trace the parts of a model, and write them as ONNX graphs whose free dimensions have names."""

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.signature import CACHE
from omni.loading.encoder import Encoder


class ExportError(ValueError):
    """The checkpoint cannot be exported. The message is one sentence."""


class _Part(nn.Module):
    """A part of a model. Its inputs and outputs have the names that they get in the graph.

    Args:
        module: holds the weights.
        run: takes tensors by keyword and returns a dictionary of tensors.
    """

    def __init__(self, module: nn.Module, run: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, **inputs: Any) -> dict[str, Any]:
        """Compute named tensors from named tensors."""
        return self.run(**inputs)


Axes = dict[int, str]
"""The free dimensions of a tensor, and what each counts."""
Traced = dict[str, tuple[nn.Module, dict[str, Any], dict[str, Axes | list[Axes]]]]
"""For each graph: its module, the inputs that it is traced with, and their free dimensions (a list of them for a cache)."""


TOKENS: Axes = {0: "rows", 1: "tokens"}


def encoder_graphs(encoder: Encoder, probes: Sequence[Any]) -> Traced:
    """The encoder of a modality, and its projector in a fused model."""
    bundle, name, items = encoder.bundle, encoder.modality, f"{encoder.bundle.noun}s"
    inputs = encoder.prepare([probes[0]] * 2)
    alone = [encoder.prepare([probe]) for probe in probes]
    grids = {grid for each in alone for grid in encoder.grid_shapes(each)}
    free: dict[str, Axes | list[Axes]] = {}
    for key, value in inputs.items():
        lengths = [axis for axis in range(1, value.ndim) if len({each[key].shape[axis] for each in alone}) > 1]
        free[key] = {
            0: items,
            **{axis: "length" if number == 0 else f"length {number + 1}" for number, axis in enumerate(lengths)},
        }
    if len(grids) > 1 and any(len(grid) > 1 for grid in grids):
        raise ExportError(
            f"The {items} of this encoder have grids of several sizes along several axes, and a graph has room for one; use "
            "an encoder whose preprocessor makes one size."
        )
    fixed = next(iter(grids)) if len(grids) == 1 else None
    patches = max(map(math.prod, grids))

    def run(**given: torch.Tensor) -> dict[str, Any]:
        encoded = encoder.model(**{bundle.arguments[key]: value for key, value in given.items()})
        return bundle.read(_without_pooler(encoder, encoded), patches)

    parts: Traced = {f"{name}_encoder": (_Part(encoder.model, run), dict(inputs), free)}
    if encoder.fused is not None:
        projector = getattr(encoder.fused, f"{name}_projector")
        output = encoder.fused.config.modalities[name]["output"].split("+")
        encoded = encoder.encode(inputs)
        tokens = {part: encoded[part].clone() for part in output}

        def project(**tokens: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"tokens": projector(tokens, fixed or (tokens["grid"].shape[1],) if "grid" in tokens else (1,))}

        axes: dict[str, Axes | list[Axes]] = {
            part: {0: items, **({1: "places"} if part == "grid" and fixed is None else {})} for part in output
        }
        parts[f"{name}_projector"] = (_Part(projector, project), tokens, axes)
    return parts


def _without_pooler(encoder: Encoder, encoded: Any) -> Any:
    if not encoder.pooled:
        encoded["pooler_output"] = None
    return encoded


def thinker_graphs(model: OmniForConditionalGeneration) -> Traced:
    """The embedding of words, and the Thinker with its cache."""
    embed = model.get_input_embeddings()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        embeds = embed(ids)
        # layers of full length also where the model has sliding windows: its masks cut them, and all inputs have one form
        cache = model(inputs_embeds=random_words(model, 2, 5), **{CACHE: DynamicCache()})[CACHE]
    mask = torch.ones(2, 8, dtype=torch.int64)
    past: list[Axes] = [{0: "rows", 2: "past"} for layer in cache.layers for _ in (layer.keys, layer.values)]
    return {
        "embedding": (
            _Part(embed, lambda input_ids: {"inputs_embeds": embed(input_ids)}),
            {"input_ids": ids},
            {"input_ids": TOKENS},
        ),
        "thinker": (
            model,
            {"inputs_embeds": embeds, "attention_mask": mask, CACHE: cache},
            {"inputs_embeds": TOKENS, "attention_mask": {0: "rows", 1: "past + tokens"}, CACHE: past},
        ),
    }


def random_words(model: OmniForConditionalGeneration, rows: int, length: int) -> torch.Tensor:
    """Embeddings of random words, float[B, L, T]. Placeholders are left out."""
    placeholders = {section["token_id"] for section in model.config.modalities.values()}
    words = [i for i in range(model.config.text_config.vocab_size) if i not in placeholders]
    chosen = np.random.default_rng(rows + length).choice(words, (rows, length))
    return model.get_input_embeddings()(torch.from_numpy(chosen))


def write_graphs(parts: Traced, model: Any, folder: Path) -> None:
    """Trace every part and write its graph, in a folder that `transformers.exporters.ExportedModel` reads."""
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

    components = {}
    with _quietly():
        exporter = OnnxExporter()
        for name, (module, inputs, free) in parts.items():
            try:
                shapes = {key: _automatic(axes) for key, axes in free.items()}
                made = exporter.export(module, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
            except Exception as error:  # errors of torch and onnxscript share no other base class
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                raise ExportError(
                    f"The {name.replace('_', ' ')} cannot be written as an ONNX graph ({reason}); torch.export may not "
                    "trace this architecture, so use another encoder or language model."
                ) from error
            (components[name],) = made.components.values()
            _name_axes(made.program, free)
        generation = getattr(model, "generation_config", None)
        ExportedModel(components, "onnx", config=model.config, generation_config=generation).save_pretrained(folder)


def _automatic(axes: Axes | list[Axes]) -> Any:
    """The free dimensions in the form that torch.export takes. It finds by itself how they depend on each other."""
    return [_automatic(each) for each in axes] if isinstance(axes, list) else dict.fromkeys(axes, Dim.AUTO)


def _name_axes(program: Any, free: Mapping[str, Axes | list[Axes]]) -> None:
    """Name the free dimensions of a graph after what they count. torch.export names them `s16` and the like."""
    import onnx_ir

    graph, names = program.graph, dict[str, str]()
    for value in graph.inputs:
        axes = free.get(value.name) or free[CACHE]
        for axis, name in (axes[0] if isinstance(axes, list) else axes).items():
            names.setdefault(str(value.shape[axis]), name)
    for value in [*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)]:
        if value.shape is not None:
            sizes = [re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), str(size)) for size in value.shape]
            value.shape = onnx_ir.Shape([int(size) if size.isdecimal() else size for size in sizes])


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporters' progress on stdout, and their advice about packages that are not used here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "transformers", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
