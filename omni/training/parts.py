"""The parts of a model during training: which are trained, which are frozen, and in which precision."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import ExportableState

from omni.checkpoints.fingerprints import part_of, safetensors_files
from omni.training.recipe import Recipe, RecipeError

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""The name of gradient checkpointing in the installed transformers."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training the parameters whose names a pattern matches (`re.search`).

    Raises:
        RecipeError: a pattern that matches no parameter, or patterns that leave nothing to train.
    """
    unused = set(patterns)
    for name, parameter in model.named_parameters():
        matching = {pattern for pattern in patterns if re.search(pattern, name)}
        unused -= matching
        if matching:
            parameter.requires_grad_(False)
    if unused:
        raise RecipeError(f"Patterns of `freeze` that match no parameter: {sorted(unused)}; {names_begin(model)}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"The patterns of `freeze`, {sorted(patterns)}, leave nothing to train.")


def resting_towers(model: nn.Module, recipe: Recipe) -> list[str]:
    """The modalities whose towers a recipe does not train: `freeze` matches all of a tower, or adapters are trained."""
    config: Any = getattr(model, "config", None)
    learning = {
        part_of(name)
        for name, _ in model.named_parameters()
        if not (recipe.lora or any(re.search(pattern, name) for pattern in recipe.freeze))
    }
    return [name for name in getattr(config, "modalities", ()) if f"{name}_tower" not in learning]


def names_begin(model: nn.Module) -> str:
    """The beginnings of a model's parameter names, for messages."""
    tops = dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in model.named_parameters())
    return f"the names begin with {', '.join(tops)}"


HALF = {"BF16": torch.bfloat16, "F16": torch.float16}
"""The types of half precision by their names in safetensors files."""


def keep_precision(model: nn.Module, folder: str | Path) -> None:
    """Convert each part of a loaded model to the half precision of its file.

    transformers loads a model whose parts differ in precision in the widest one.
    """
    stored = _types(Path(folder))
    for part, place in (getattr(model.config, "parts_from", None) or {}).items():
        kinds: set[str] = set().union(*_types(Path(place)).values())
        stored |= dict.fromkeys(("language_model", "lm_head") if part == "language_model" else (part,), kinds)
    for part, tensors in _parts(model).items():
        kinds = stored.get(part, set())
        if len(kinds) == 1 and (dtype := HALF.get(next(iter(kinds)))) is not None:
            _convert(tensors, dtype)


def _types(folder: Path) -> dict[str, set[str]]:
    """The types of each part's tensors, by their names in safetensors files."""
    found: dict[str, set[str]] = {}
    for file in safetensors_files(folder, None):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found.setdefault(part_of(name), set()).add(opened.get_slice(name).get_dtype())
    return found


def learn_in_float32(model: nn.Module) -> None:
    """Convert the parts that are trained to float32, because half precision loses small updates.

    Adapters are float32 already, and their part keeps its precision.
    """
    parts = _parts(model)
    if "lm_head" in parts:  # its input is the language model's output
        parts["language_model"] |= parts.pop("lm_head")
    for tensors in parts.values():
        if any(tensor.requires_grad and "lora_" not in name for name, tensor in tensors.items()):
            _convert(tensors, torch.float32)


def _parts(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and buffers of each part of a fused model, with or without adapters, by name."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        parts.setdefault(part_of(name.removeprefix("base_model.model.")), {})[name] = tensor
    return parts


def _convert(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    for tensor in tensors.values():
        # buffers such as rotary frequencies are computed in float32 in a model of any precision
        if tensor.is_floating_point() and (dtype == torch.float32 or isinstance(tensor, nn.Parameter)):
            tensor.data = tensor.data.to(dtype)


class Learning(TrainerCallback, ExportableState):
    """Removes a part from `config.untrained` when it gets a gradient.

    Args:
        learnt: parts that got one before the run was resumed.
    """

    def __init__(self, learnt: Sequence[str] = ()) -> None:
        self.learnt = list(learnt)

    def apply(self, model: nn.Module) -> None:
        """Remove the parts that have been trained from `untrained` in a model's configuration."""
        config: Any = getattr(model, "config", None)
        if untrained := getattr(config, "untrained", None):
            config.untrained = [part for part in untrained if part not in self.learnt]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the parts that have a gradient."""
        model = kwargs["model"]
        if untrained := getattr(getattr(model, "config", None), "untrained", None):
            parts = _parts(model)
            self.learnt += [part for part in untrained if any(map(_has_gradient, parts.get(part, {}).values()))]
            self.apply(model)

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"args": {"learnt": self.learnt}, "attributes": {}}


def _has_gradient(parameter: torch.Tensor) -> bool:
    gradient = parameter.grad
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return local is not None and bool(local.any())


class FrozenParts(TrainerCallback):
    """Keeps parts without a trainable parameter in eval mode, so that they have no dropout.

    `Trainer` sets the whole model to training mode before each step, so this runs before each forward. Backward goes
    through a frozen language model to the projector, and may recompute its activations (gradient checkpointing).
    transformers does this only for layers in training mode. So these layers are in training mode outside of their own
    forward, and in eval mode inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts = list(_frozen(model))
        modules = [module for part in self.parts for module in part.modules()]
        self.layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
        if self.parts:
            model.register_forward_pre_hook(self._rest)

    def _rest(self, *_: Any) -> None:
        for part in self.parts:
            part.eval()
        for layer in self.layers:
            layer.training = layer.gradient_checkpointing

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        before = [layer.training for layer in self.layers]
        for layer in self.layers:
            layer.training = False
        try:
            yield
        finally:
            for layer, training in zip(self.layers, before, strict=True):
                layer.training = training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have frozen layers compute in eval mode, in the forward pass and when activations are recomputed."""
        settings = {"use_reentrant": False, **(getattr(args, f"{CHECKPOINTING}_kwargs") or {})}
        if not (getattr(args, CHECKPOINTING) and self.layers) or settings["use_reentrant"]:
            return
        options = {key: settings.pop(key) for key in ("every_n_layers", "offload") if key in settings}
        settings["context_fn"] = lambda: (self._at_rest(), self._at_rest())
        enable = getattr(kwargs["model"], f"{CHECKPOINTING}_enable")
        enable(**{f"{CHECKPOINTING}_kwargs": settings}, **options)


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    trainable = [p.requires_grad for p in module.parameters()]
    if trainable and not any(trainable):
        yield module
    else:
        for child in module.children():
            yield from _frozen(child)
