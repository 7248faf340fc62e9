"""Muon for the matrices, AdamW for everything else, behind the one optimizer that `Trainer` expects."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on the hidden matrices and `torch.optim.AdamW` on embeddings, norms, biases and convolutions.

    Muon (Jordan 2024; learning rates matched to AdamW's as in Liu et al. 2025, "Muon is Scalable") orthogonalises the
    update of a matrix. Both parts share this object's `param_groups` and `state`, so schedulers and checkpoints see one
    optimizer.
    """

    def __init__(self, matrices: Iterable[dict[str, Any]], others: Iterable[dict[str, Any]]) -> None:
        groups = [{**group, "algorithm": "muon"} for group in matrices]
        groups += [{**group, "algorithm": "adamw"} for group in others]
        self._parts: dict[str, torch.optim.Optimizer] = {}
        super().__init__(groups, {})
        self._parts = {
            "muon": torch.optim.Muon(self._groups("muon"), adjust_lr_fn="match_rms_adamw"),
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss


def is_hidden_matrix(module: nn.Module, name: str) -> bool:
    """Whether Muon is meant for this parameter: the weight of a linear layer."""
    return isinstance(module, nn.Linear) and name == "weight"
