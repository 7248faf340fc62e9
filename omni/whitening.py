"""Whitening: a linear layer whose weights are measured, not trained.

Most of the variance of an encoder's tokens lies in a few directions. A projector of unwhitened tokens learns the other
directions last.
"""

import torch
import torch.nn.functional as F
from torch import nn

NOISE = 0.1
"""Share of the mean variance that is added to each direction's variance, so that whitening does not amplify noise."""


class Whitening(nn.Module):
    """float[..., D] -> float[..., D], with mean 0 and about equal variance in all directions.

    Until `measure` is called, it is the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whiten tokens float[..., D] in the precision of the layer. The result has the precision of the tokens."""
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        return F.linear(tokens.to(weight.dtype), weight, bias).to(tokens.dtype)

    @torch.no_grad()
    def measure(self, tokens: torch.Tensor) -> None:
        """Set the weights by tokens float[n, D]: the inverse square root of their covariance (ZCA)."""
        mean = tokens.mean(0)
        values, vectors = torch.linalg.eigh((tokens - mean).T @ (tokens - mean) / len(tokens))
        matrix = vectors * (values.clamp_min(0) + NOISE * values.mean()).rsqrt() @ vectors.T
        self.get_buffer("weight").copy_(matrix)
        self.get_buffer("bias").copy_(-mean @ matrix)
