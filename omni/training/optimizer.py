"""Muon for the matrices, AdamW for everything else, behind the one optimizer that `Trainer` expects."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from omni.training.recipe import Optimizer, RecipeError


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` in float32, matrices of one shape together, with learning rates matched to AdamW's.

    torch multiplies in bfloat16, which takes many times as long on processors that do not know it. Defaults and state are
    torch's.

    Args:
        params: groups of parameters, with `lr` and `weight_decay`.
    """

    def __init__(self, params: Iterable[dict[str, Any]]) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, with Nesterov's momentum."""
        loss = _loss(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for matrix in group["params"]:
                if (gradient := matrix.grad) is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
                by_shape.setdefault(matrix.shape, []).append((matrix, gradient.lerp(average, momentum)))
            for shape, found in by_shape.items():
                updates = orthogonal(
                    torch.stack([update for _, update in found]), group["ns_coefficients"], group["ns_steps"]
                )
                for (matrix, _), update in zip(found, updates, strict=True):
                    matrix.mul_(1 - lr * group["weight_decay"])
                    matrix.add_(update, alpha=-lr * 0.2 * math.sqrt(max(shape)))
        return loss


def _loss(closure: Any) -> Any:
    """What an optimizer's step does first, where it is given a function that computes the loss anew."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def orthogonal(matrices: torch.Tensor, coefficients: Sequence[float], steps: int) -> torch.Tensor:
    """The same singular vectors with singular values near 1: [B, M, N] -> float32[B, M, N].

    By Newton-Schulz iteration (Jordan 2024), X <- (a + b XX^T + c (XX^T)^2) X.
    """
    first, third, fifth = coefficients
    upright = matrices.shape[1] > matrices.shape[2]
    x = matrices.float().mT if upright else matrices.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        squares = torch.bmm(x, x.mT)
        factor = torch.bmm(squares, squares).mul_(fifth).add_(squares, alpha=third)
        factor.diagonal(dim1=1, dim2=2).add_(first)
        x = torch.bmm(factor, x)
    return x.mT if upright else x


class MuonAdamW(torch.optim.Optimizer):
    """`Muon` on the hidden matrices and `torch.optim.AdamW` on embeddings, norms, biases and convolutions.

    Muon (Jordan 2024; learning rates matched to AdamW's as in Liu et al. 2025, "Muon is Scalable") orthogonalises the
    update of a matrix. Both parts share this object's `param_groups` and `state`, so schedulers and checkpoints see one
    optimizer.

    Args:
        matrices, others: groups of parameters for either.
        bf16: whether matrices are orthogonalised in bfloat16.
    """

    def __init__(
        self, matrices: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]], bf16: bool = False
    ) -> None:
        groups = [{**group, "algorithm": "muon"} for group in matrices]
        groups += [{**group, "algorithm": "adamw"} for group in others]
        self._parts: dict[str, torch.optim.Optimizer] = {}
        super().__init__(groups, {})
        muon = self._groups("muon")
        self._parts = {
            "muon": torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw") if bf16 else Muon(muon),
            "adamw": torch.optim.AdamW(self._groups("adamw"), betas=(0.9, 0.95)),
        }
        self._share()

    def _groups(self, algorithm: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    def _share(self) -> None:
        for name, part in self._parts.items():
            part.param_groups, part.state = self._groups(name), self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # replaces groups and state: loading a checkpoint ends here
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both parts."""
        loss = _loss(closure)
        for part in self._parts.values():
            part.step()
        return loss


def is_hidden_matrix(module: nn.Module, name: str) -> bool:
    """Whether Muon is meant for this parameter: the weight of a linear layer."""
    return isinstance(module, nn.Linear) and name == "weight"


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
        raise RecipeError(f"Patterns of `freeze` that match no parameter: {sorted(unused)}; {_names(model)}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"The patterns of `freeze`, {sorted(patterns)}, leave nothing to train.")


def _names(model: nn.Module) -> str:
    tops = dict.fromkeys(".".join(name.split(".")[:2]) for name, _ in model.named_parameters())
    return f"the names begin with {', '.join(tops)}"


def make_optimizer(model: nn.Module, settings: Optimizer, bf16: bool = False) -> torch.optim.Optimizer:
    """Groups of parameters by learning rate and decay; vectors (norms, biases) never decay. `bf16` is that of `MuonAdamW`.

    Raises:
        RecipeError: a pattern of `lr_scale` that matches no trainable parameter.
    """
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    unused, seen = set(settings.lr_scale), set()
    heads = {id(p) for p in _output_heads(model)}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            patterns = [p for p in settings.lr_scale if re.search(p, f"{module_name}.{name}")]
            unused -= set(patterns)
            scale = settings.lr_scale[patterns[-1]] if patterns else 1.0
            matrix = settings.name == "muon" and is_hidden_matrix(module, name) and id(parameter) not in heads
            groups.setdefault((matrix, scale, parameter.ndim > 1), []).append(parameter)
    if unused:
        raise RecipeError(f"Patterns of lr_scale that match no trainable parameter: {sorted(unused)}; {_names(model)}.")

    def made(matrix: bool) -> list[dict[str, Any]]:
        return [
            {"params": params, "lr": settings.lr * scale, "weight_decay": settings.weight_decay * decays}
            for (is_matrix, scale, decays), params in groups.items()
            if is_matrix == matrix
        ]

    return MuonAdamW(made(True), made(False), bf16) if settings.name == "muon" else torch.optim.AdamW(made(False))


def _output_heads(model: nn.Module) -> list[nn.Parameter]:
    """Weights of output heads, which are classifiers, not hidden matrices."""
    heads: list[nn.Module] = list(getattr(model, "heads", {}).values())
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        heads.append(head)
    return [parameter for module in heads for parameter in module.parameters()]
