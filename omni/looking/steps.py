"""The steps of one forward pass of an encoder. See `omni.looking.layers` for what is counted.

`Watch` records modules and attention scores while they are computed. `walk` makes a list of steps of them. `OWN` adds the
steps of omni's own encoders that are no modules, such as the positions that are added to the tokens.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

BYTES = 4
"""Bytes per float32."""

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


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
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

    def __enter__(self) -> "Watch":
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


def walk(model: nn.Module, watch: Watch, flops: dict[str, int]) -> list[Step]:
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
