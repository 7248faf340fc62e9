"""Positions chosen from a batch: in a new order, or only those whose logits are wanted, with their labels."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F


def take(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Select positions int64[B, n] of a tensor [B, L, ...], row by row: [B, n, ...]."""
    return torch.take_along_dim(tensor, order.reshape(*order.shape, *[1] * (tensor.ndim - 2)), dim=1)


def keep(hidden_states: torch.Tensor, chosen: int | torch.Tensor) -> torch.Tensor:
    """The hidden states float[B, L, T] of the chosen positions; see `logits_to_keep` of the fused model's `forward`."""
    if isinstance(chosen, torch.Tensor) and chosen.dtype == torch.bool:
        return hidden_states[chosen]
    if isinstance(chosen, torch.Tensor) and chosen.ndim == 2:
        return take(hidden_states, chosen)
    return hidden_states[:, slice(-chosen, None) if isinstance(chosen, int) else chosen]


def keep_labels(
    labels: torch.Tensor, chosen: int | torch.Tensor, options: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Arguments of the loss for positions that were chosen one by one, by bool[B, L]; empty for any other choice.

    Args:
        labels: int64[B, L], -100 where nothing is to be learnt.
        chosen: as `keep` takes it; n positions are true.
        options: the loss's other arguments. `unseen` int64[B, L] is aligned with the labels.

    Returns:
        `shift_labels` int64[n], what the n logits are to predict, and `unseen` int64[n] if it is given.

    Raises:
        ValueError: a label whose position is not chosen.
    """
    if not isinstance(chosen, torch.Tensor) or chosen.dtype != torch.bool:
        return {}
    following = _shifted(labels)
    if left_out := int(((following != -100) & ~chosen).sum()):
        raise ValueError(
            f"{left_out} of {int((following != -100).sum())} labelled tokens follow positions that logits_to_keep "
            "leaves out, and would not be learnt; it must be true before every label."
        )
    kept = {"shift_labels": following[chosen]}
    return kept | ({"unseen": _shifted(options["unseen"])[chosen]} if "unseen" in options else {})


def _shifted(values: torch.Tensor) -> torch.Tensor:
    """At each position the value of the next one: int64[B, L] -> int64[B, L]."""
    return F.pad(values[:, 1:], (0, 1), value=-100)
