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
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from omni.checkpoints.folder import reason_of
from omni.files import read_json
from omni.fusion.thinker import eager_attention
from omni.items import Item, read_item
from omni.loading.encoder import Encoder, find_encoder, load_encoder

BYTES = 4
"""Bytes per float32."""

OURS = "omni_vision"
"""The model type of a configuration that names none, as in the seed document."""

Shape = tuple[int, ...]


class Step(BaseModel):
    """One step of an encoder, a row of the table.

    Attributes:
        name: what happens. The table indents it by `depth`.
        module: full name of the module in the model; None for a step that is no module.
        depth: 0 for the parts of the model, 1 for their parts, and so on.
        shape: shape of the output.
        parameters: number of learned parameters.
        flops: number of operations.
        activation_bytes: memory of the output.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    module: str | None = None
    depth: int = 0
    shape: Shape
    parameters: int = 0
    flops: int = 0
    activation_bytes: int = 0


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
    with eager_attention(model.config), _Watch(model) as watch, counter, torch.no_grad():
        try:
            output = model(**inputs)
        except (ValueError, TypeError, RuntimeError) as error:
            what = f"pictures of {_pixels(size)}" if size else _listed(shapes)
            raise ValueError(f"{type(model).__name__} cannot encode {what}: {error}") from error
    counts = counter.get_flop_counts()
    flops = {name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name in watch.steps}
    rows = _walk(model, watch, flops)
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


# --- One forward pass, watched ----------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the steps of a forward pass inside a `with` block.

    Attributes:
        steps: names of modules in the order in which they are entered. Attention scores are no module; they appear where
            they are computed, as a part called "scores" of the module that computes them.
        shapes: shape of the output of each step.
        scores: the names of the steps that are attention scores.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[str] = []
        self.shapes: dict[str, Shape] = {}
        self.scores: set[str] = set()
        self._model = model
        self._inside: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Watch":
        for name, module in self._model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            self._hooks.append(module.register_forward_hook(self._leaving(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._inside.append(name)
            if name and name not in self.steps:
                self.steps.append(name)

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._inside.pop()
            if name:
                self.shapes.setdefault(name, _shape(output))

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default and self._inside:
            name = f"{self._inside[-1]}.scores"
            if name not in self.scores:
                self.steps.append(name)
            self.scores.add(name)
            self.shapes.setdefault(name, tuple(output.shape))
        return output


def _shape(output: Any) -> Shape:
    """The shape of a tensor, or of the first tensor in a tuple or in an output of transformers."""
    while output is not None and not isinstance(output, torch.Tensor):
        values = list(output.values()) if isinstance(output, Mapping) else output
        output = values[0] if isinstance(values, (list, tuple)) and values else None
    return () if output is None else tuple(output.shape)


def _walk(model: nn.Module, watch: _Watch, flops: dict[str, int]) -> list[Step]:
    """All steps but dropout and identities, each followed by its parts."""
    inside: dict[str, list[str]] = defaultdict(list)
    for step in watch.steps:
        parent = step.rpartition(".")[0]
        while parent and parent not in watch.shapes:  # lists of modules are never entered
            parent = parent.rpartition(".")[0]
        inside[parent].append(step)

    def rows_inside(parent: str, depth: int) -> list[Step]:
        rows: list[Step] = []
        for step in inside[parent]:
            name, shape = step.removeprefix(f"{parent}."), watch.shapes[step]
            size = BYTES * math.prod(shape)
            if step in watch.scores:  # the products of the parent that belong to none of its modules
                products = flops[parent] - sum(flops.get(other, 0) for other in inside[parent])
                rows.append(Step(name=name, depth=depth, shape=shape, flops=products, activation_bytes=size))
                continue
            module, parts = model.get_submodule(step), rows_inside(step, depth + 1)
            if not parts and (isinstance(module, nn.Identity) or "Drop" in type(module).__name__):
                continue
            memory = sum(part.activation_bytes for part in parts if part.depth == depth + 1)
            if not parts or any(True for _ in module.parameters(recurse=False)):  # its output is its own
                memory += size
            rows.append(
                Step(
                    name=name,
                    module=step,
                    depth=depth,
                    shape=shape,
                    parameters=sum(parameter.numel() for parameter in module.parameters()),
                    flops=flops.get(step, 0),
                    activation_bytes=memory,
                )
            )
            rows += parts
        return rows

    return rows_inside("", 0)


# --- The steps of omni's own encoders that are no modules -------------------------------------------------------------


def _as_in_the_seed(rows: list[Step], model: Any, output: Any) -> list[Step]:
    """The steps of the vision encoder, as the seed document names them."""
    embeddings, patches, *others = rows
    batch, width, *grid = patches.shape
    positions = model.embeddings.position_embeddings.numel()
    return [
        patches.model_copy(update={"name": "patch embedding", "depth": 0}),
        Step(name="sequence", shape=(batch, math.prod(grid), width)),
        _made("CLS in front", embeddings.shape, parameters=model.embeddings.cls_token.numel()),
        _made("plus positions", embeddings.shape, parameters=positions),
        *_blocks_and_outputs(others, model, output),
    ]


def _as_it_hears(rows: list[Step], model: Any, output: Any) -> list[Step]:
    """The steps of the audio encoder. Its stem has parts, as a block has."""
    inside = [row for row in rows if (row.module or "").startswith("embeddings.stem")]
    embeddings, others = rows[0], rows[1 + len(inside) :]
    stem, parts = inside[0], list[Step]()
    for row in inside[1:]:
        number = row.name.removeprefix("convolutions.")
        convolution = number != row.name
        name = f"convolution {int(number) + 1}" if convolution else row.name
        parts.append(row.model_copy(update={"name": name, "depth": 1}))
        if convolution:
            parts.append(_made("activation", row.shape, depth=1))
    memory = sum(part.activation_bytes for part in parts)
    steps = [stem.model_copy(update={"depth": 0, "activation_bytes": memory}), *parts]
    if model.config.position_embedding != "none":
        steps.append(_made("plus positions", stem.shape))
    if model.config.cls_token:
        steps.append(_made("CLS in front", embeddings.shape, parameters=model.embeddings.cls_token.numel()))
    return [*steps, *_blocks_and_outputs(others, model, output)]


def _blocks_and_outputs(rows: list[Step], model: Any, output: Any) -> list[Step]:
    names = {f"layers.{i}": f"block {i + 1}" for i in range(len(model.layers))} | {"norm": type(model.norm).__name__}
    renamed = [row.model_copy(update={"name": names.get(row.module or "", row.name)}) for row in rows]
    return [*renamed, *(Step(name=name, shape=tuple(output[name].shape)) for name in ("cls", "grid"))]


def _made(name: str, shape: Shape, depth: int = 0, parameters: int = 0) -> Step:
    """A step that is no module but has an output."""
    size = BYTES * math.prod(shape)
    return Step(name=name, shape=shape, depth=depth, parameters=parameters, activation_bytes=size)


OWN = {"omni_vision": _as_in_the_seed, "omni_audio": _as_it_hears}
"""By model type."""
