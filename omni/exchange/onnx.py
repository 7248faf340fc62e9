"""Export a checkpoint as ONNX graphs, which run in onnxruntime without torch and transformers.

    image_encoder     pixel_values (I, 3, H, W)           -> cls (I, 1, D), grid (I, N, D)
    image_projector   cls and grid, as the model has it   -> tokens (I, n, T)
    audio_encoder     audio_features (I, F, M), audio_mask (I, F)
                                                          -> cls (I, 1, D), grid (I, N, D)
    audio_projector   as for pictures; so for any other modality, under its name
    embedding         input_ids (B, L)                    -> inputs_embeds (B, L, T)
    thinker           inputs_embeds (B, L, T), attention_mask (B, P+L), past keys and values (B, h, P, d)
                                                          -> logits (B, L, V), keys and values (B, h, P+L, d)

Shapes: I items, N tokens of the encoder, D its width, n tokens that an item becomes, T width of the Thinker; B rows of the
batch, L new tokens, P earlier ones, V tokens of the vocabulary, h heads of width d. I, B, L and P are free, and so is the
length of items that have one, F. P may be 0, so that one graph reads the prompt and writes the answer. One line of NumPy
puts the items' tokens in their places: see `examples/ask_without_torch.py`. Of items that were padded, an item's own tokens
come first.

Beside the graphs stand the preprocessors' files and `omni.json`, which says how a picture becomes numbers and how a prompt
looks. An encoder alone becomes one graph. `transformers.exporters` makes the graphs. Before they are kept, they run in
onnxruntime and are compared with the model.
"""

import contextlib
import io
import json
import logging
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.export import Dim
from transformers import DynamicCache

from omni.checkpoints.folder import base_of, model_type_of
from omni.files import write_text_whole
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.fusion.signature import CACHE
from omni.loading.checkpoint import load
from omni.loading.encoder import Encoder, load_encoder
from omni.loading.preprocessor import save_preprocessor

TOLERANCE = 1e-4
"""Largest accepted difference between graph and model. It is relative to the largest value where that is above 1."""
SETTINGS = "omni.json"
"""The file that says how a picture becomes numbers, how a prompt looks and which tokens end an answer."""
QUESTION = "{question}"
"""Marks the place of the question in a prompt."""


class ExportError(ValueError):
    """The checkpoint cannot be exported. The message is one sentence."""


class MissingPackageError(ExportError):
    """A package is missing, or too old."""


class DifferenceError(ExportError):
    """The graphs differ from the model."""


class Graph(BaseModel):
    """One graph of an export.

    Attributes:
        file: name of the file in the folder.
        inputs, outputs: their names and shapes. A free dimension is a string.
        megabytes: size on disk, weights included.
        difference: largest difference from the model, relative to its largest value where that is above 1.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    megabytes: float
    difference: float


class Export(BaseModel):
    """An export that was written.

    Attributes:
        folder: its folder.
        graphs: its graphs.
        tolerance: the largest accepted difference from the model.
    """

    model_config = ConfigDict(frozen=True)

    folder: str
    graphs: list[Graph]
    tolerance: float


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


def export(checkpoint: str | Path, output: str | Path, tolerance: float = TOLERANCE) -> Export:
    """Write a fused model or an encoder as ONNX graphs in float32, and compare them with the model.

    Args:
        checkpoint: folder of a fused model, of adapters for one, or of a vision encoder (omni's or of transformers).
        output: the new folder.
        tolerance: largest accepted difference, relative to the largest value where that is above 1.

    Raises:
        ExportError: a package is missing, the output exists, the model cannot be exported, or the graphs differ from it.
            No file is left then.
        CheckpointError: the checkpoint cannot be loaded.
    """
    output = Path(output)
    if output.exists():
        raise ExportError(f"Expected a new folder, but {str(output)!r} exists already; name another, or remove it.")
    _needs_packages()
    fused = model_type_of(base_of(Path(checkpoint))) == OmniConfig.model_type
    if fused:
        model, processor = load(checkpoint)
        model = model.float().eval()
        encoders = [
            Encoder(getattr(model.model, f"{name}_tower"), preprocessor, fused=model.model, modality=name)
            for name, preprocessor in processor.preprocessors.items()
        ]
    else:
        encoders = [load_encoder(checkpoint)]
        encoders[0].model.float()
    try:
        probes = {encoder.modality: encoder.probes() for encoder in encoders}
    except ValueError as error:
        raise ExportError(str(error)) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as place:
        folder = Path(place) / "export"
        parts = {name: part for each in encoders for name, part in _encoder(each, probes[each.modality]).items()}
        if fused:
            parts |= _thinker(model)
        _write(parts, model if fused else encoders[0].model, folder)
        settings = {key: value for encoder in encoders for key, value in _pixels(encoder.preprocessor).items()}
        if fused:
            processor.save_pretrained(folder)
            settings |= _prompt(model, processor)
        else:
            save_preprocessor(encoders[0].preprocessor, folder)
        write_text_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        differences = dict[str, float]()
        for encoder in encoders:
            _compare(folder, encoder, probes[encoder.modality], differences)
        if fused:
            _compare_thinker(folder, model, differences)
        if not all(difference <= tolerance for difference in differences.values()):  # false for NaN, too
            listed = ", ".join(f"{name} by {difference:.2g}" for name, difference in differences.items())
            raise DifferenceError(
                f"The graphs differ from the model by more than {tolerance:g} ({listed}), so nothing is written; please "
                "report this with the checkpoint."
            )
        graphs = [_describe(folder / f"{name}.onnx", difference) for name, difference in differences.items()]
        shutil.move(folder, output)
    return Export(folder=str(output), graphs=graphs, tolerance=tolerance)


def _needs_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import transformers.exporters  # noqa: F401 - the oldest supported transformers lacks it
    except ImportError as error:
        raise MissingPackageError(
            f"Exporting needs a package that is missing or too old ({error}): pip install 'omni-thinker[onnx]'."
        ) from error


# --- The graphs -------------------------------------------------------------------------------------------------------


TOKENS: Axes = {0: "rows", 1: "tokens"}


def _encoder(encoder: Encoder, probes: Sequence[Any]) -> Traced:
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


def _thinker(model: OmniForConditionalGeneration) -> Traced:
    embed = model.get_input_embeddings()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        embeds = embed(ids)
        # layers of full length also where the model has sliding windows: its masks cut them, and all inputs have one form
        cache = model(inputs_embeds=_embeds(model, 2, 5), **{CACHE: DynamicCache()})[CACHE]
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


def _embeds(model: OmniForConditionalGeneration, rows: int, length: int) -> torch.Tensor:
    """Embeddings of random words, float[B, L, T]. Placeholders are left out."""
    placeholders = {section["token_id"] for section in model.config.modalities.values()}
    words = [i for i in range(model.config.text_config.vocab_size) if i not in placeholders]
    chosen = np.random.default_rng(rows + length).choice(words, (rows, length))
    return model.get_input_embeddings()(torch.from_numpy(chosen))


def _write(parts: Traced, model: Any, folder: Path) -> None:
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


# --- The settings beside the graphs -----------------------------------------------------------------------------------


def _pixels(image_processor: Any) -> dict[str, Any]:
    """How a picture becomes numbers: it is resized, multiplied by a scale, and a shift is added. Empty if there is more."""
    values = image_processor.to_dict()
    try:
        size, mean, std = values["size"], np.array(values["image_mean"]), np.array(values["image_std"])
        if not values["do_normalize"]:
            mean, std = np.zeros(3), np.ones(3)
        told = {
            "size": [size["width"], size["height"]],
            "resample": int(values["resample"]),
            "scale": (values["rescale_factor"] / std).tolist(),
            "shift": (-mean / std).tolist(),
        }
    except (KeyError, TypeError):
        return {}
    noise = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    ours = np.array(picture.resize(told["size"], told["resample"])) * told["scale"] + told["shift"]
    theirs = image_processor([picture], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    return {"pixels": told} if ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5 else {}


def _prompt(model: OmniForConditionalGeneration, processor: OmniProcessor) -> dict[str, Any]:
    """How a prompt of one item of each modality and a question looks, and which tokens end an answer."""
    content = [*({"type": bundle.name} for bundle in processor.bundles), {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if any(prompt.count(part) != 1 for part in (QUESTION, *(bundle.token for bundle in processor.bundles))):
        nouns = " and ".join(f"a {bundle.noun}" for bundle in processor.bundles)
        raise ExportError(
            f"The chat template writes {nouns} and a question as {prompt!r}; expected each of them once, so correct it."
        )
    ends = model.generation_config.eos_token_id
    return {
        "prompt": prompt,
        **{f"{bundle.name}_token": bundle.token for bundle in processor.bundles},
        **{f"{name}_token_id": section["token_id"] for name, section in model.config.modalities.items()},
        "end_token_ids": list(ends) if isinstance(ends, (list, tuple)) else [ends],
    }


# --- The graphs against the model -------------------------------------------------------------------------------------


def _note(found: dict[str, float], name: str, ours: Any, theirs: torch.Tensor) -> None:
    """Keep the largest difference of a graph from the model."""
    expected = theirs.detach().numpy()
    apart = float(np.abs(ours - expected).max() / max(1.0, float(np.abs(expected).max())))
    found[name] = max(found.get(name, 0.0), apart) if apart == apart else apart


def _compare(folder: Path, encoder: Encoder, probes: Sequence[Any], found: dict[str, float]) -> None:
    """The largest differences of an encoder's graphs, of one item and of several at once, from the model's of one at a time.

    Other numbers of items, and others of several lengths, are tried than traced.
    """
    name = encoder.modality
    encode = _session(folder / f"{name}_encoder.onnx")
    for items in (probes[:1], probes[1:]):
        inputs = {key: value.numpy() for key, value in encoder.prepare(items).items()}
        encoded = _run(encode, {each.name: inputs[each.name] for each in encode.get_inputs()})
        projected = None
        if encoder.fused is not None:
            parts = encoder.fused.config.modalities[name]["output"].split("+")
            projected = _run(_session(folder / f"{name}_projector.onnx"), {part: encoded[part] for part in parts})[
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
def _compare_thinker(folder: Path, model: OmniForConditionalGeneration, found: dict[str, float]) -> None:
    """Compare prompts of one row, and of two rows where one is padded on the left; then token after token."""
    embed, think = _session(folder / "embedding.onnx"), _session(folder / "thinker.onnx")
    ids = torch.arange(min(8, model.config.text_config.vocab_size))[None]
    _note(
        found, "embedding", _run(embed, {"input_ids": ids.numpy()})["inputs_embeds"], model.get_input_embeddings()(ids)
    )
    for rows, length in ((1, 7), (2, 12)):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1:, :4] = 0
        cache, past = DynamicCache(), _empty_past(think, rows)
        for step in range(3):
            embeds = _embeds(model, rows, length if step == 0 else 1)
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


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def _describe(path: Path, difference: float) -> Graph:
    session = _session(path)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Graph(
        file=path.name,
        inputs={each.name: list(each.shape) for each in session.get_inputs()},
        outputs={each.name: list(each.shape) for each in session.get_outputs()},
        megabytes=round(size / 1e6, 1),
        difference=difference,
    )
