"""The steps of an encoder, layer by layer, with shape, parameters, FLOPs and memory of each: `omni inspect`.

    inspection = inspect_encoder("configs/vision_tiny.json", image_size=224, batch_size=1)
    rich.print(render(inspection))
    print(inspection.model_dump_json())
    inspect_encoder("checkpoints/omni_tiny", item="examples/scene.png")

One forward pass is watched: hooks tell the shapes, `torch.utils.flop_counter` tells the operations, and the modules tell
their parameters. An encoder of pictures is built from its configuration on the "meta" device, where tensors have shapes and
no contents. So no weights are read, nothing is computed, and a large tower takes no longer than a small one. How much any
other encoder computes depends on what it reads: it is loaded, and reads an item, by default one that its modality makes up
(`Modality.probes`).

Conventions:

* **FLOPs.** One multiply-add counts as two operations. Matrix products and convolutions are counted; norms, softmax,
  activations and sums are not.
* **Memory** is the bytes of the output of each step, in float32. A view of an earlier output counts as nothing, and so do
  dropout, which is off here, and the sums of residual branches. Scores count once, after the softmax, as eager attention
  writes them; fused kernels (sdpa, flash) never store them.
* **Depth.** The numbers of a row include those of the deeper rows right below it. Rows of depth 0 add up to the totals.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from omni.checkpoints.folder import reason_of
from omni.files import read_json
from omni.fusion.thinker import eager_attention
from omni.items import Item, read_item
from omni.loading.encoder import Encoder, find_encoder, load_encoder
from omni.looking.steps import OWN, Shape, Step, Watch, walk

OURS = "omni_vision"
"""The model type of a configuration that names none, as in the seed document."""


class Inspection(BaseModel):
    """The steps of one encoder for one batch of items, with the totals.

    Attributes:
        model: name of the model class.
        image_size: height and width in pixels; None where the encoder reads no pictures.
        batch_size: number of items.
        inputs: shapes of what the encoder reads, by the arguments of its forward.
        rows: the steps in order, each followed by its parts.
        parameters, flops, activation_bytes: sums over the steps of depth 0.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    image_size: tuple[int, int] | None
    batch_size: int
    inputs: dict[str, Shape]
    rows: tuple[Step, ...]
    parameters: int
    flops: int
    activation_bytes: int


def inspect_encoder(
    config_or_path: PreTrainedConfig | str | Path,
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 1,
    item: Any = None,
) -> Inspection:
    """List the steps of an encoder: the modules, and for omni's own encoders also steps that are no modules.

    Args:
        config_or_path: a configuration, a checkpoint folder, or a JSON file with a configuration. A configuration without
            "model_type", such as `configs/vision_tiny.json`, is one of omni's vision encoder. Of a model with a
            `vision_config` (CLIP, LLaVA, a fused omni model), that tower is inspected.
        image_size: of an encoder of pictures side, or height and width, in pixels. By default the size in the configuration.
        batch_size: number of items.
        item: the item that is read, or its file, see `omni.items.read_item`. Of a model of several encoders, the one of
            its modality is inspected.

    Raises:
        ValueError: the file is missing or holds no configuration, the model type is unknown or that of no encoder, or the
            model refuses what it reads.
        ItemError: the item's file cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, found {batch_size}.")
    source = config_or_path if isinstance(config_or_path, PreTrainedConfig) else Path(config_or_path)
    config = source if isinstance(source, PreTrainedConfig) else _read_config(source)
    size: tuple[int, int] | None = None
    if item is None:
        part = getattr(config, "vision_config", None) or config
        with torch.device("meta"):
            model = _build(part)
            if _sees(part):
                size = _height_and_width(image_size, part)
                inputs = _pictures(model, size, batch_size)
    if size is None:
        if image_size is not None:
            what = "An item has a size of its own" if item is not None else f"{type(model).__name__} reads no pictures"
            raise ValueError(f"{what}; leave out the image size.")
        model, inputs = _with_item(source, config, None if item is None else read_item(item), batch_size)
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    counter = FlopCounterMode(display=False)
    # only eager attention shows its scores
    with eager_attention(model.config), Watch(model) as watch, counter, torch.no_grad():
        try:
            output = model(**inputs)
        except (ValueError, TypeError, RuntimeError) as error:
            what = f"pictures of {_pixels(size)}" if size else _listed(shapes)
            raise ValueError(f"{type(model).__name__} cannot encode {what}: {error}") from error
    counts = counter.get_flop_counts()
    flops = {name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name in watch.steps}
    rows = walk(model, watch, flops)
    if model.config.model_type in OWN:
        rows = OWN[model.config.model_type](rows, model, output)
    return Inspection(
        model=type(model).__name__,
        image_size=size,
        batch_size=batch_size,
        inputs=shapes,
        rows=tuple(rows),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=counter.get_total_flops(),
        activation_bytes=sum(row.activation_bytes for row in rows if row.depth == 0),
    )


def render(inspection: Inspection) -> Table:
    """The steps as a table for the terminal."""
    size, count = inspection.image_size, inspection.batch_size
    pictures = f"{count} picture{'s' * (count > 1)} of {_pixels(size)}" if size else _listed(inspection.inputs)
    table = Table(
        title=f"{inspection.model}: {pictures}",
        caption="One multiply-add is two FLOPs. Memory: outputs in float32.",
        show_footer=True,
    )
    table.add_column("layer", "total", no_wrap=True)
    table.add_column("output", justify="right", no_wrap=True)
    table.add_column("parameters", _count(inspection.parameters), justify="right", no_wrap=True)
    table.add_column("FLOPs", _flops(inspection.flops), justify="right", no_wrap=True)
    table.add_column("memory", _memory(inspection.activation_bytes), justify="right", no_wrap=True)
    for row in inspection.rows:
        table.add_row(
            "  " * row.depth + row.name,
            _dimensions(row.shape),
            _count(row.parameters),
            _flops(row.flops),
            _memory(row.activation_bytes),
            style="" if row.depth else "bold",
        )
    return table


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} pixels"


def _listed(inputs: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {_dimensions(shape)}" for name, shape in inputs.items())


def _dimensions(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _flops(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number else ""


def _memory(number: int) -> str:
    return f"{number / 1024:,.1f} KiB" if number else ""


# --- A model and what it reads ----------------------------------------------------------------------------------------


def _read_config(path: Path) -> PreTrainedConfig:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read; expected a checkpoint folder or a JSON configuration.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no configuration, but a {type(values).__name__}; expected a JSON object.")
    model_type = values.pop("model_type", OURS)
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path} is no configuration of a known model: {error}") from error


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        # a copy, because from_config writes the attention into the configuration
        model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
    except Exception as error:  # sizes from anywhere; what builds a model of them raises anything
        raise ValueError(f"No model of type {config.model_type!r} can be built: {reason_of(error)}") from error
    return model.float().eval()


def _pictures(model: PreTrainedModel, size: tuple[int, int], batch_size: int) -> dict[str, Any]:
    """Pictures of any size for a vision encoder."""
    config = model.config
    own_size = getattr(config, "image_size", None)
    resized = own_size is not None and size != _height_and_width(own_size, config)
    takes_resized = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    options = {"interpolate_pos_encoding": True} if resized and takes_resized else {}
    return {"pixel_values": torch.empty(batch_size, getattr(config, "num_channels", 3), *size), **options}


def _sees(config: PreTrainedConfig) -> bool:
    """Whether this is the configuration of an encoder of pictures. Those of videos read `pixel_values` under another key."""
    try:
        return "pixel_values" in find_encoder(config)[0].inputs
    except ValueError:
        return False


def _height_and_width(size: Any, config: PreTrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", None) if size is None else size
    if size is None:
        raise ValueError(f"A configuration of type {config.model_type!r} names no image size; pass one, such as 224.")
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"Height and width must be at least 1, found {height}x{width}.")
    return height, width


def _with_item(
    source: PreTrainedConfig | Path, config: PreTrainedConfig, item: Item | None, batch_size: int
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """An encoder, and the inputs of an item, `batch_size` times."""
    name = None if item is None else item.modality
    if isinstance(source, Path) and source.is_dir():
        encoder = load_encoder(source, name)
    else:
        try:
            bundle, part = find_encoder(config, name)
        except ValueError as error:
            raise ValueError(f"There is no encoder to inspect: {error}") from error
        model = bundle.build_tower(copy.deepcopy(part)).eval()
        encoder = Encoder(model, bundle.preprocessor_class(), modality=bundle.name)
    encoder.model.float()
    inputs = encoder.prepare([encoder.probes()[0] if item is None else item.value] * batch_size)
    return encoder.model, {encoder.bundle.arguments[key]: value for key, value in inputs.items()}
