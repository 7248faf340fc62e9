"""The steps of an encoder, layer by layer, with shape, parameters, FLOPs and memory of each: `omni inspect`.

    inspection = inspect_encoder("configs/vision_tiny.json", image_size=224, batch_size=1)
    rich.print(render(inspection))
    print(inspection.model_dump_json())

The model is built from its configuration on the "meta" device, where tensors have shapes and no contents. So no weights
are read, nothing is computed, and a large tower takes no longer than a small one. One forward pass is watched: hooks
tell the shapes, `torch.utils.flop_counter` tells the operations, and the modules tell their parameters.

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
import json
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

from omni.registry import get_modality

BYTES = 4
"""Bytes of a float32."""

OURS = "omni_vision"
"""Model type of omni's own encoder. A configuration without a model type is of this type."""

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
    """The steps of one encoder for one batch of pictures, with the totals.

    Attributes:
        model: name of the model class.
        image_size: height and width in pixels.
        batch_size: number of pictures.
        rows: the steps in order, each followed by its parts.
        parameters, flops, activation_bytes: sums over the steps of depth 0.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    image_size: tuple[int, int]
    batch_size: int
    rows: tuple[Step, ...]
    parameters: int
    flops: int
    activation_bytes: int


def inspect_encoder(
    config_or_path: PreTrainedConfig | str | Path, image_size: int | Sequence[int] | None = None, batch_size: int = 1
) -> Inspection:
    """List the steps of a vision encoder: for omni's own the steps of the seed document, for any other its modules.

    Args:
        config_or_path: a configuration, a checkpoint folder, or a JSON file with a configuration. A configuration without
            "model_type", such as `configs/vision_tiny.json`, is one of omni's own encoder. Of a model with a
            `vision_config` (CLIP, LLaVA, a fused omni model), that tower is inspected.
        image_size: side, or height and width, in pixels. By default the size in the configuration.
        batch_size: number of pictures.

    Raises:
        ValueError: the file is missing or holds no configuration, the model type is unknown, the model does not read
            pictures, or it refuses the size.
    """
    config = config_or_path if isinstance(config_or_path, PreTrainedConfig) else _read_config(Path(config_or_path))
    config = getattr(config, "vision_config", None) or config
    own_size = getattr(config, "image_size", None)
    height, width = _height_and_width(own_size if image_size is None else image_size, config)
    if batch_size < 1:
        raise ValueError(f"The batch size must be at least 1, found {batch_size}.")
    with torch.device("meta"):
        model = _build(config)
        pixels = torch.empty(batch_size, getattr(config, "num_channels", 3), height, width)
    resized = own_size is not None and (height, width) != _height_and_width(own_size, config)
    takes_resized = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    options = {"interpolate_pos_encoding": True} if resized and takes_resized else {}
    counter = FlopCounterMode(display=False)
    with _Watch(model) as watch, counter, torch.no_grad():
        try:
            output = model(pixel_values=pixels, **options)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{type(model).__name__} cannot encode pictures of {height}x{width} pixels: {error}"
            ) from error
    counts = counter.get_flop_counts()
    flops = {name: sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) for name in watch.steps}
    rows = _walk(model, watch, flops)
    if config.model_type == OURS:
        rows = _as_in_the_seed(rows, model, output)
    return Inspection(
        model=type(model).__name__,
        image_size=(height, width),
        batch_size=batch_size,
        rows=tuple(rows),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=counter.get_total_flops(),
        activation_bytes=sum(row.activation_bytes for row in rows if row.depth == 0),
    )


def render(inspection: Inspection) -> Table:
    """The steps as a table for the terminal."""
    height, width = inspection.image_size
    pictures = f"{inspection.batch_size} picture{'s' * (inspection.batch_size > 1)}"
    table = Table(
        title=f"{inspection.model}: {pictures} of {height}x{width} pixels",
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
            " x ".join(map(str, row.shape)),
            _count(row.parameters),
            _flops(row.flops),
            _memory(row.activation_bytes),
            style="" if row.depth else "bold",
        )
    return table


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _flops(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number else ""


def _memory(number: int) -> str:
    return f"{number / 1024:,.1f} KiB" if number else ""


# --- From a configuration to a model on the meta device ---------------------------------------------------------------


def _read_config(path: Path) -> PreTrainedConfig:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read; expected a checkpoint folder or a JSON configuration.") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no configuration, but a {type(values).__name__}; expected a JSON object.")
    model_type = values.pop("model_type", OURS)
    if model_type == OURS:
        get_modality("image")  # makes the type known to AutoConfig and AutoModel
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ValueError(f"{path} is no configuration of a known model: {error}") from error


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    if config.model_type == OURS:
        get_modality("image")
    try:
        # only eager attention shows its scores; a copy, because from_config writes the choice into the configuration
        model = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager")
    except (ValueError, ImportError) as error:
        raise ValueError(f"No model of type {config.model_type!r} can be built: {error}") from error
    if model.main_input_name != "pixel_values":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name!r}, and not pictures; choose a vision encoder."
        )
    return model.float().eval()


def _height_and_width(size: Any, config: PreTrainedConfig) -> tuple[int, int]:
    if size is None:
        raise ValueError(f"A configuration of type {config.model_type!r} names no image size; pass one, such as 224.")
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"Height and width must be at least 1, found {height}x{width}.")
    return height, width


# --- One forward pass, watched ----------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the steps of a forward pass inside of its `with` block.

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
            if not parts or any(True for _ in module.parameters(recurse=False)):  # its output is no output of its parts
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


def _as_in_the_seed(rows: list[Step], model: Any, output: Any) -> list[Step]:
    """The steps of omni's own encoder as the seed document names them, with those that are no modules."""
    embeddings, patches, *others = rows
    batch, width, *grid = patches.shape
    size = BYTES * math.prod(embeddings.shape)
    cls_token, positions = model.embeddings.cls_token.numel(), model.embeddings.position_embeddings.numel()
    blocks = {f"layers.{i}": f"block {i + 1}" for i in range(len(model.layers))}
    return [
        patches.model_copy(update={"name": "patch embedding", "depth": 0}),
        Step(name="sequence", shape=(batch, math.prod(grid), width)),
        Step(name="CLS in front", shape=embeddings.shape, parameters=cls_token, activation_bytes=size),
        Step(name="plus positions", shape=embeddings.shape, parameters=positions, activation_bytes=size),
        *(row.model_copy(update={"name": {**blocks, "norm": "RMSNorm"}.get(row.name, row.name)}) for row in others),
        Step(name="cls", shape=tuple(output.cls.shape)),
        Step(name="grid", shape=tuple(output.grid.shape)),
    ]
