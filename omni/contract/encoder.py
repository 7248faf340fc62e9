"""Checks of the encoder: shapes, types, determinism, batches, gradients, files."""

import copy
import inspect
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from omni.checkpoints.folder import CONFIG, CheckpointError
from omni.checkpoints.seal import MODEL
from omni.contract.checks import BrokenError, Check
from omni.contract.subject import Subject, Tokens
from omni.fusion.modeling_omni import OmniForConditionalGeneration

TOLERANCE = 1e-4
"""The largest difference that rounding explains in float32, relative to the norm of a token."""


def is_built(subject: Subject) -> None:
    """`model_class` or `build` makes the encoder, and its forward takes the inputs."""
    encoder = subject.encoder
    if not isinstance(encoder, PreTrainedModel):
        raise BrokenError(
            f"The encoder is a {type(encoder).__name__}, expected a PreTrainedModel; derive it from that."
        )
    parameters = inspect.signature(encoder.forward).parameters
    for key, argument in subject.modality.arguments.items():
        if argument not in parameters:
            raise BrokenError(
                f"`inputs` hands {key} to the argument {argument!r}, which forward of {type(encoder).__name__} does not "
                f"have ({', '.join(parameters)}); rename one of the two."
            )


@torch.no_grad()
def has_shapes(subject: Subject) -> None:
    """The encoder returns `cls` float[I, 1, D] and `grid` float[I, N, D]."""
    modality, width = subject.modality, subject.encoder.config.hidden_size
    for items in (subject.items, *([item] for item in subject.items)):
        inputs = subject.prepare(items)
        encoded, shapes = subject.encode(inputs), subject.shapes(inputs)
        if len(shapes) != len(items):
            raise BrokenError(
                f"`grid_shapes` returns {len(shapes)} shapes for {len(items)} items; return one for each."
            )
        for shape in shapes:
            if len(shape) != modality.grid_dims or not all(isinstance(side, int) and side > 0 for side in shape):
                raise BrokenError(
                    f"`grid_shapes` returns {shape}, expected {modality.grid_dims} whole numbers from 1 on (`grid_dims`); "
                    "correct one of the two."
                )
        longest = max(map(math.prod, shapes))
        named = modality.read(encoded, longest)
        if lacking := [part for output in modality.outputs for part in output.split("+") if part not in named]:
            raise BrokenError(
                f"`outputs` promises {lacking[0]!r}, and the encoder returns {list(named)}; return it, or leave it out of "
                "`outputs`."
            )
        for part, tokens in named.items():
            _check_tokens(part, tokens, len(items), width)
        if "grid" in named:
            _check_count(named["grid"], longest)


def _check_tokens(part: str, tokens: torch.Tensor, count: int, width: int) -> None:
    n = "N" if part == "grid" else "1"
    if tokens.ndim != 3 or tokens.shape[0] != count or (part == "cls" and tokens.shape[1] != 1):
        raise BrokenError(
            f"Of {count} items `{part}` has the shape {tuple(tokens.shape)}, expected ({count}, {n}, {width}); shape it so."
        )
    if tokens.shape[2] != width:
        raise BrokenError(
            f"Tokens of `{part}` have the width {tokens.shape[2]}, and `hidden_size` of the configuration is {width}; the "
            "projector trusts it, so make them equal."
        )
    if not tokens.isfinite().all():
        raise BrokenError(f"`{part}` is not finite with new weights; look for a division by zero in the encoder.")


def _check_count(grid: torch.Tensor, told: int) -> None:
    """Compare the tokens of `grid` with `told`, the number that `grid_shapes` gives for the longest item."""
    if grid.shape[1] < told:
        raise BrokenError(f"`grid` has {grid.shape[1]} tokens, but `grid_shapes` says {told}; make them agree.")
    if grid[:, told:].any():
        raise BrokenError(
            f"`grid` has {grid.shape[1]} tokens, but `grid_shapes` says {told}, so the last ones are never read; "
            "count them, or set them to zero if they are padding."
        )


@torch.no_grad()
def is_deterministic(subject: Subject) -> None:
    """In eval mode, the same items give the same tokens."""
    first, second = subject.tokens(subject.items), subject.tokens(subject.items)
    if (found := _apart(first, second)) is not None:
        raise BrokenError(
            f"In eval mode `{found}` of the same items differs from call to call; remove randomness from forward, or let it "
            "act in training alone."
        )


@torch.no_grad()
def tells_items_apart(subject: Subject) -> None:
    """Different items give different tokens."""
    for first, second in pairwise(subject.items):
        if _same(subject.prepare([first]), subject.prepare([second])):
            continue
        (one,), (other,) = subject.tokens([first]), subject.tokens([second])
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True)):
            raise BrokenError(
                "The encoder's tokens of two different items are equal; let forward read all of `inputs`."
            )


def _same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(first[key].shape == second[key].shape and first[key].equal(second[key]) for key in first)


@torch.no_grad()
def is_alone_in_a_batch(subject: Subject) -> None:
    """Items of several sizes have the same tokens in one batch and one by one."""
    together = subject.tokens(subject.items)
    for number, (item, there) in enumerate(zip(subject.items, together, strict=True), 1):
        (alone,) = subject.tokens([item])
        if (found := _apart([there], [alone])) is not None:
            raise BrokenError(
                f"`{found}` of item {number} differs between a batch of {len(together)} items and that item alone; mask the "
                "padding in the encoder, and let no item see another."
            )


@torch.no_grad()
def follows_the_type(subject: Subject) -> None:
    """The encoder works in bfloat16, and its tokens have that type."""
    encoder = copy.deepcopy(subject.encoder).to(torch.bfloat16)
    inputs = subject.prepare(subject.items)
    try:
        encoded = subject.encode(inputs, encoder)
    except RuntimeError as error:
        raise BrokenError(
            f"In bfloat16 forward raises {type(error).__name__} ({error}); convert floating inputs with `.to(self.dtype)`."
        ) from error
    for part, tokens in subject.modality.read(encoded, max(map(math.prod, subject.shapes(inputs)))).items():
        if tokens.dtype != torch.bfloat16:
            raise BrokenError(
                f"In a bfloat16 model `{part}` is {str(tokens.dtype).removeprefix('torch.')}; convert floating inputs "
                "with `.to(self.dtype)`, and results back to it."
            )


def gets_gradients(subject: Subject) -> None:
    """Every parameter that can be trained gets a gradient."""
    encoder = copy.deepcopy(subject.encoder)
    random = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        loss = torch.zeros(())
        for tokens in subject.tokens(subject.items, encoder):
            for value in tokens.values():
                loss = loss + (value * torch.randn(value.shape, generator=random)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    without = [
        name
        for name, parameter in encoder.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]
    if without:
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise BrokenError(
            f"No gradient reaches {', '.join(without[:3])}{more}: neither cls nor grid depends on it; use it in forward, "
            "remove it, or freeze it with requires_grad_(False)."
        )


# --- On disk ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def comes_back(subject: Subject) -> None:
    """A saved and loaded encoder has the same tensors, and gives the same tokens."""
    folder, encoder = subject.folder("encoder"), subject.encoder
    encoder.save_pretrained(folder)
    loaded = type(encoder).from_pretrained(folder).eval()
    there = loaded.state_dict()
    for name, tensor in encoder.state_dict().items():
        if name not in there or not torch.equal(there[name], tensor):
            raise BrokenError(f"{name} of the encoder does not come back from save_pretrained; let it be saved.")
    if (found := _apart(subject.tokens(subject.items), subject.tokens(subject.items, loaded))) is not None:
        raise BrokenError(
            f"A saved and loaded encoder has another `{found}`; what is not saved is lost: make buffers persistent, or fill "
            "them in `_init_weights`."
        )


def refuses_other_tensors(subject: Subject) -> None:
    """A fused model is refused if its tower lacks a tensor or has one too many, even without a seal and fingerprints."""
    folder = subject.folder("strict")
    subject.model.save_pretrained(folder)
    (folder / MODEL).unlink()
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config.pop("fingerprints", None)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    file = folder / "model.safetensors"
    whole = load_file(file)
    prefix = f"model.{subject.name}_tower."
    if not (names := [name for name in whole if name.startswith(prefix)]):
        raise BrokenError("The encoder saves no tensor; let its parameters be saved.")
    for name in (names[0], names[-1]):
        _refuses(file, {key: value for key, value in whole.items() if key != name}, f"lacks {name}")
    _refuses(file, {**whole, f"{prefix}stranger": torch.zeros(1)}, f"holds a stranger, {prefix}stranger")


def _refuses(file: Path, tensors: dict[str, torch.Tensor], what: str) -> None:
    save_file(tensors, file, {"format": "pt"})
    try:
        OmniForConditionalGeneration.from_pretrained(file.parent)
    except CheckpointError:
        return
    raise BrokenError(
        f"A checkpoint that {what} is loaded without an error; remove from the encoder's class what changes how weights are "
        "loaded."
    )


def _apart(first: list[Tokens], second: list[Tokens]) -> str | None:
    """The first part whose tokens differ by more than rounding."""
    for one, other in zip(first, second, strict=True):
        for part in one:
            a, b = one[part].double(), other[part].double()
            if a.shape != b.shape or not (a - b).norm(dim=-1).max() <= TOLERANCE * b.norm(dim=-1).max():
                return part
    return None


CHECKS = (
    Check("encoder", "The encoder is built, and takes the inputs.", is_built, ("configuration", "preprocessor")),
    Check(
        "shapes", "cls is float[I, 1, D], grid float[I, N, D]; N is the product of the grid.", has_shapes, ("encoder",)
    ),
    Check("determinism", "The same items give the same tokens.", is_deterministic, ("shapes",)),
    Check("reading", "Different items give different tokens.", tells_items_apart, ("shapes",)),
    Check("batch = single", "Tokens of an item do not depend on its batch.", is_alone_in_a_batch, ("determinism",)),
    Check("dtype", "Tokens have the type of the model.", follows_the_type, ("shapes",)),
    Check("gradients", "Every parameter that can be trained gets a gradient.", gets_gradients, ("shapes",)),
    Check("save and load", "A saved and loaded encoder is the same.", comes_back, ("determinism",)),
    Check("strict loading", "A missing or an unknown tensor is refused.", refuses_other_tensors, ("encoder",)),
)
