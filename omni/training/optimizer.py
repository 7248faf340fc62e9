"""Muon for matrices and AdamW for all other parameters, as the one optimizer that `Trainer` expects."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from omni.training.parts import names_begin
from omni.training.recipe import RecipeError
from omni.training.sections import Optimizer


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` for many small matrices: it updates all matrices of one shape together.

    torch updates one matrix after the other, and always multiplies in bfloat16, which is slow on processors without it.
    Learning rates match AdamW's. Defaults and state are torch's.

    Args:
        params: groups of parameters, with `lr` and `weight_decay`.
        dtype: type of the matrix products.
    """

    def __init__(self, params: Iterable[dict[str, Any]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(params, adjust_lr_fn="match_rms_adamw")
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step with Nesterov momentum. Returns the loss of `closure`, if it is given."""
        loss = _loss(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not matrices:
                continue
            for matrix in matrices:
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for matrix in matrices:
                average = self.state[matrix]["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                by_shape.setdefault(matrix.shape, []).append((matrix, torch.lerp(matrix.grad, average, momentum)))
                matrix.mul_(1 - lr * group["weight_decay"])
            for shape, found in by_shape.items():
                alike, updates = zip(*found, strict=True)
                made = orthogonal(torch.stack(updates).to(self._dtype), group["ns_coefficients"], group["ns_steps"])
                for matrix, step in zip(alike, made.to(alike[0].dtype).unbind(), strict=True):
                    matrix.add_(step, alpha=-lr * 0.2 * math.sqrt(max(shape)))
        return loss


def _loss(closure: Any) -> Any:
    """The loss that the `closure` of an optimizer's step computes; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def orthogonal(matrices: torch.Tensor, coefficients: Sequence[float], steps: int) -> torch.Tensor:
    """Matrices float[B, M, N] with the same singular vectors and with singular values near 1.

    Newton-Schulz iteration (Jordan 2024): X <- aX + (b XX^T + c (XX^T)^2) X.
    """
    first, third, fifth = coefficients
    upright = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if upright else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        squares = torch.bmm(x, x.mT)
        factor = torch.baddbmm(squares, squares, squares, beta=third, alpha=fifth)
        x = torch.baddbmm(x, factor, x, beta=first)
    return x.mT if upright else x


class MuonAdamW(torch.optim.Optimizer):
    """`Muon` on hidden matrices, `torch.optim.AdamW` on embeddings, norms, biases and convolutions.

    Muon (Jordan 2024; learning rates matched to AdamW's as in Liu et al. 2025, "Muon is Scalable") orthogonalises the
    update of a matrix. Both share this object's `param_groups` and `state`, so schedulers and checkpoints see one
    optimizer.

    Args:
        matrices: groups of parameters for Muon.
        others: groups of parameters for AdamW.
        bf16: orthogonalise in bfloat16.
    """

    def __init__(
        self, matrices: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]], bf16: bool = False
    ) -> None:
        groups = [{**group, "algorithm": "muon"} for group in matrices]
        groups += [{**group, "algorithm": "adamw"} for group in others]
        self._parts: dict[str, torch.optim.Optimizer] = {}
        super().__init__(groups, {"lr": max(group["lr"] for group in groups)})
        muon = self._groups("muon")
        self._parts = {
            "muon": Muon(muon, torch.bfloat16 if bf16 else torch.float32),
            "adamw": torch.optim.AdamW(self._groups("adamw"), betas=(0.9, 0.95)),
        }
        self._share()

    def _groups(self, algorithm: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["algorithm"] == algorithm]

    def _share(self) -> None:
        for name, part in self._parts.items():
            part.param_groups, part.state = self._groups(name), self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # loading a checkpoint replaces groups and state here
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both. Returns the loss of `closure`, if it is given."""
        loss = _loss(closure)
        for part in self._parts.values():
            part.step()
        return loss


def is_hidden_matrix(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer, which Muon is made for."""
    return isinstance(module, nn.Linear) and name == "weight"


def make_optimizer(model: nn.Module, settings: Optimizer, bf16: bool = False) -> torch.optim.Optimizer:
    """The optimizer of a recipe, with groups of parameters by learning rate and decay. Norms and biases never decay.

    Args:
        model: the model to train.
        settings: the recipe's.
        bf16: see `MuonAdamW`.

    Raises:
        RecipeError: a pattern of `lr_scale` matches no trainable parameter.
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
        raise RecipeError(
            f"Patterns of lr_scale that match no trainable parameter: {sorted(unused)}; {names_begin(model)}."
        )

    def made(matrix: bool) -> list[dict[str, Any]]:
        return [
            {"params": params, "lr": settings.lr * scale, "weight_decay": settings.weight_decay * decays}
            for (is_matrix, scale, decays), params in groups.items()
            if is_matrix == matrix
        ]

    return (
        MuonAdamW(made(True), made(False), bf16)
        if settings.name == "muon"
        else torch.optim.AdamW(made(False), lr=settings.lr)
    )


def _output_heads(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of output heads. These are classifiers, not hidden matrices."""
    heads: list[nn.Module] = list(getattr(model, "heads", {}).values())
    if isinstance(classifier := getattr(model, "classifier", None), nn.Module):
        heads.append(classifier)
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        heads.append(head)
    return [parameter for module in heads for parameter in module.parameters()]
