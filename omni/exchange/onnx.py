"""Export a checkpoint as ONNX graphs, which run in onnxruntime without torch and transformers.

    image_encoder     pixel_values (I, 3, H, W)           -> cls (I, 1, D), grid (I, N, D)
    image_projector   cls and grid, as the model has it   -> tokens (I, n, T)
    embedding         input_ids (B, L)                    -> inputs_embeds (B, L, T)
    thinker           inputs_embeds (B, L, T), attention_mask (B, P+L), past keys and values (B, h, P, d)
                                                          -> logits (B, L, V), keys and values (B, h, P+L, d)

Shapes: I pictures, N patches, D width of the encoder, n tokens that a picture becomes, T width of the Thinker; B rows of
the batch, L new tokens, P earlier ones, V tokens of the vocabulary, h heads of width d. I, B, L and P are free. P may be
0, so that one graph reads the prompt and writes the answer. One line of NumPy puts the pictures' tokens in their places:
see `examples/ask_without_torch.py`.

Beside the graphs stand the processor's files and `omni.json`, which says how a picture becomes numbers and how a prompt
looks. An encoder alone becomes `image_encoder`. `transformers.exporters` makes the graphs. Before they are kept, they run
in onnxruntime and are compared with the model.
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
from collections.abc import Callable, Iterator, Mapping
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
from omni.registry import get_modality

TOLERANCE = 1e-4
"""Largest accepted difference between graph and model. It is relative to the largest value where that is above 1."""
SETTINGS = "omni.json"
"""The file that says how a picture becomes numbers, how a prompt looks and which tokens end an answer."""
QUESTION = "{question}"
"""Marks the place of the question in a prompt."""


class ExportError(ValueError):
    """The checkpoint cannot be exported. The message is one sentence."""


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
    """A part of a model whose inputs and outputs have the names that the graph is to have.

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
        if strangers := sorted({*model.config.modalities} - {"image"}):
            raise ExportError(
                f"Expected a model that reads pictures alone; this one also reads {', '.join(strangers)}, which cannot be "
                "exported."
            )
        model = model.float().eval()
        encoder = Encoder(model.model.image_tower, processor.preprocessors["image"], fused=model.model)
    else:
        encoder = load_encoder(checkpoint)
        encoder.model.float()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as place:
        folder = Path(place) / "export"
        parts = _encoder(encoder)
        if fused:
            parts |= _fused(model, encoder)
        _write(parts, model if fused else encoder.model, folder)
        (processor if fused else encoder.image_processor).save_pretrained(folder)
        settings = _pixels(encoder.image_processor) | (_prompt(model, processor) if fused else {})
        write_text_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        differences = _compare(folder, encoder, model if fused else None)
        if not all(difference <= tolerance for difference in differences.values()):  # false for NaN, too
            listed = ", ".join(f"{name} by {difference:.2g}" for name, difference in differences.items())
            raise ExportError(
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
        raise ExportError(
            f"Exporting needs a package that is missing or too old ({error}): pip install 'omni-thinker[onnx]'."
        ) from error


# --- The graphs -------------------------------------------------------------------------------------------------------


PICTURES: Axes = {0: "pictures"}
TOKENS: Axes = {0: "rows", 1: "tokens"}


def _encoder(encoder: Encoder) -> Traced:
    pixel_values = encoder.prepare([Image.new("RGB", (encoder.side, encoder.side))] * 2)
    patches = math.prod(encoder.grid_shape(pixel_values))

    def run(pixel_values: torch.Tensor) -> dict[str, Any]:
        return get_modality("image").read(_without_pooler(encoder, encoder.model(pixel_values=pixel_values)), patches)

    return {"image_encoder": (_Part(encoder.model, run), {"pixel_values": pixel_values}, {"pixel_values": PICTURES})}


def _without_pooler(encoder: Encoder, encoded: Any) -> Any:
    if not encoder.pooled:
        encoded["pooler_output"] = None
    return encoded


def _fused(model: OmniForConditionalGeneration, encoder: Encoder) -> Traced:
    projector, embed = model.model.image_projector, model.get_input_embeddings()
    pixel_values = encoder.prepare([Image.new("RGB", (encoder.side, encoder.side))] * 2)
    shape = encoder.grid_shape(pixel_values)
    encoded = encoder.encode(pixel_values)
    tokens = {name: encoded[name].clone() for name in model.config.modalities["image"]["output"].split("+")}
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with torch.no_grad():
        embeds = embed(ids)
        # layers of full length also where the model has sliding windows: its masks cut them, and all inputs have one form
        cache = model(inputs_embeds=_embeds(model, 2, 5), **{CACHE: DynamicCache()})[CACHE]
    mask = torch.ones(2, 8, dtype=torch.int64)
    past: list[Axes] = [{0: "rows", 2: "past"} for layer in cache.layers for _ in (layer.keys, layer.values)]
    return {
        "image_projector": (
            _Part(projector, lambda **tokens: {"tokens": projector(tokens, shape)}),
            dict(tokens),
            dict.fromkeys(tokens, PICTURES),
        ),
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
    """How a prompt of one picture and a question looks, and which tokens end an answer."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if not prompt.count(QUESTION) == prompt.count(processor.image_token) == 1:
        raise ExportError(
            f"The chat template writes a picture and a question as {prompt!r}; expected each of them once, so correct it."
        )
    ends = model.generation_config.eos_token_id
    return {
        "prompt": prompt,
        "image_token": processor.image_token,
        "image_token_id": model.config.modalities["image"]["token_id"],
        "end_token_ids": list(ends) if isinstance(ends, (list, tuple)) else [ends],
    }


# --- The graphs against the model -------------------------------------------------------------------------------------


def _compare(folder: Path, encoder: Encoder, model: OmniForConditionalGeneration | None) -> dict[str, float]:
    """Each graph's largest difference from the model. Other numbers of pictures, rows and tokens are tried than traced."""
    found: dict[str, float] = {}

    def note(name: str, ours: Any, theirs: torch.Tensor) -> None:
        expected = theirs.detach().numpy()
        apart = float(np.abs(ours - expected).max() / max(1.0, float(np.abs(expected).max())))
        found[name] = max(found.get(name, 0.0), apart) if apart == apart else apart

    encode = _session(folder / "image_encoder.onnx")
    generator = torch.Generator().manual_seed(0)
    side = encoder.prepare([Image.new("RGB", (encoder.side, encoder.side))]).shape[1:]
    for count in (1, 3):
        pixel_values = torch.randn(count, *side, generator=generator)
        expected = encoder.encode(pixel_values)
        encoded = _run(encode, {"pixel_values": pixel_values.numpy()})
        for name in encoded:
            note("image_encoder", encoded[name], expected[name])
        if model is not None:
            tokens = {name: encoded[name] for name in model.config.modalities["image"]["output"].split("+")}
            projected = _run(_session(folder / "image_projector.onnx"), tokens)["tokens"]
            note("image_projector", projected, expected["projected"])
    if model is None:
        return found
    with torch.no_grad():
        _compare_thinker(folder, model, note)
    return found


def _compare_thinker(
    folder: Path, model: OmniForConditionalGeneration, note: Callable[[str, Any, torch.Tensor], None]
) -> None:
    """Compare prompts of one row, and of two rows where one is padded on the left; then token after token."""
    embed, think = _session(folder / "embedding.onnx"), _session(folder / "thinker.onnx")
    ids = torch.arange(min(8, model.config.text_config.vocab_size))[None]
    note("embedding", _run(embed, {"input_ids": ids.numpy()})["inputs_embeds"], model.get_input_embeddings()(ids))
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
            note("thinker", outputs["logits"][:, -1], expected.logits[:, -1])
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
