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

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from omni.checkpoints.folder import base_of, model_type_of
from omni.exchange.differences import compare_encoder, compare_thinker, open_session
from omni.exchange.graphs import ExportError, encoder_graphs, thinker_graphs, write_graphs
from omni.files import write_text_whole
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniForConditionalGeneration
from omni.fusion.processing_omni import OmniProcessor
from omni.loading.checkpoint import load
from omni.loading.encoder import Encoder, load_encoder
from omni.loading.preprocessor import save_preprocessor

__all__ = ["DifferenceError", "Export", "ExportError", "Graph", "MissingPackageError", "export"]

TOLERANCE = 1e-4
"""Largest accepted difference between graph and model. It is relative to the largest value where that is above 1."""
SETTINGS = "omni.json"
"""The file that says how a picture becomes numbers, how a prompt looks and which tokens end an answer."""
QUESTION = "{question}"
"""Marks the place of the question in a prompt."""


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
        parts = {name: part for each in encoders for name, part in encoder_graphs(each, probes[each.modality]).items()}
        if fused:
            parts |= thinker_graphs(model)
        write_graphs(parts, model if fused else encoders[0].model, folder)
        settings = {key: value for encoder in encoders for key, value in _pixels(encoder.preprocessor).items()}
        if fused:
            processor.save_pretrained(folder)
            settings |= _prompt(model, processor)
        else:
            save_preprocessor(encoders[0].preprocessor, folder)
        write_text_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        differences = dict[str, float]()
        for encoder in encoders:
            compare_encoder(folder, encoder, probes[encoder.modality], differences)
        if fused:
            compare_thinker(folder, model, differences)
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


def _describe(path: Path, difference: float) -> Graph:
    session = open_session(path)
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return Graph(
        file=path.name,
        inputs={each.name: list(each.shape) for each in session.get_inputs()},
        outputs={each.name: list(each.shape) for each in session.get_outputs()},
        megabytes=round(size / 1e6, 1),
        difference=difference,
    )
