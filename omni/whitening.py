"""Whitening: a linear layer that is measured and does not learn.

Most of what an encoder's tokens hold lies in a few directions. A projector that reads them as they are learns the others
last.
"""

import torch
import torch.nn.functional as F
from torch import nn

NOISE = 0.1
"""Of the mean variance, added to that of each direction, so that whitening does not bring up noise."""


class Whitening(nn.Module):
    """float[..., D] -> float[..., D] with mean 0 and about one size in all directions, once it has been measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whiten in the precision of the layer; the result has that of the tokens."""
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return F.linear(tokens.to(weight.dtype), weight, bias).to(tokens.dtype)

    @torch.no_grad()
    def measure(self, tokens: torch.Tensor) -> None:
        """Whiten by many tokens float[n, D]: with the inverse square root of their covariance (ZCA)."""
        mean = tokens.mean(0)
        values, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
        matrix = vectors * (values.clamp_min(0) + NOISE * values.mean()).rsqrt() @ vectors.T
        self.get_buffer("weight").copy_(matrix)
        self.get_buffer("bias").copy_(-mean @ matrix)
