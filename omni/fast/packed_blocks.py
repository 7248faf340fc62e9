"""The blocks of the encoders, packed for inference on CPUs: their weights are prepared once.

They differ from `omni.blocks` in these ways, which make them faster:

* For CLS alone, the last block computes one row. Its query is multiplied with the keys' weights, since q (W_k h) equals
  (q W_k) h, and the weighted sum is taken before the values' weights. So neither keys nor values are computed.
* With a C++ compiler, everything is one function of machine code (`compiled_encoder.py`). Each thread takes an item
  through all layers within its own caches. It uses the processor's matrix units, if there are any.
* Without one, weights are stored in the layout of oneDNN's kernels. GELU and the residual sum are part of the product before
  them. In bfloat16, attention is two batched products, with one pass of powers of two between them (`attend`).

In float32 the result differs from the model's by rounding alone.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN

from omni.blocks import Block

SAFE = 2.0**100
"""Bound on the sum of a row of powers of two. A bfloat16 reaches 2^127, and keeps all its digits down to 2^-126."""

FUSED = {"gelu": ("gelu", "none"), "gelu_pytorch_tanh": ("gelu", "tanh"), "relu": ("relu", "")}
"""Activations that oneDNN computes with a product: transformers' name and oneDNN's."""


def is_plain(model: nn.Module) -> bool:
    """Whether an encoder on a CPU is just what its configuration describes: no adapters, hooks, quantised or cut weights."""
    with torch.device("meta"):
        expected = type(model)(copy.deepcopy(model.config))
    if [*map(type, model.modules())] != [*map(type, expected.modules())]:
        return False
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return False
    return all(
        parameter.shape == other.shape and parameter.is_cpu
        for parameter, other in zip(model.parameters(), expected.parameters(), strict=True)
    )


class PackedBlock:
    """As `Block`: float[B, 1+N, D] -> float[B, 1+N, D], or the CLS row alone."""

    def __init__(self, layer: Block, dtype: torch.dtype, rows: int) -> None:
        attention, mlp = layer.attention, layer.mlp
        self.dtype, self.heads = dtype, attention.num_attention_heads
        self.norm1, self.norm2 = _layer_norm(layer.norm1, dtype), _layer_norm(layer.norm2, dtype)
        qkv, _, _ = _attention_weights(layer, math.log2(math.e) if dtype == torch.bfloat16 else 1.0)
        _, to_scores, from_values = _attention_weights(layer, 1.0)
        self.qkv, self.to_scores, self.from_values = (linear(*w, dtype, rows) for w in (qkv, to_scores, from_values))
        self.output = linear(attention.o_proj.weight, attention.o_proj.bias, dtype, rows)
        self.fc1 = linear(mlp.fc1.weight, mlp.fc1.bias, dtype, rows, attention.config.hidden_act)
        self.fc2 = linear(mlp.fc2.weight, mlp.fc2.bias, dtype, rows)

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float[B, n, D] -> float[B, n, D]."""
        qkv = self.qkv(self.norm1(hidden_states))
        if self.dtype == torch.bfloat16:
            attended = attend(qkv, self.heads)
        else:
            query, key, value = rearrange(qkv, "b n (k h d) -> k b h n d", k=3, h=self.heads)
            attended = F.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).flatten(2)
        return self._mlp(self.output(attended, hidden_states))

    def cls(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float[B, n, D] -> float[B, 1, D]."""
        normed = self.norm1(hidden_states)
        query = self.to_scores(normed[:, 0].contiguous()).view(len(normed), self.heads, -1)  # (B, h, D)
        attended = (query @ normed.transpose(1, 2)).softmax(-1) @ normed
        return self._mlp(self.from_values(attended.flatten(1), hidden_states[:, 0].contiguous())[:, None])

    def _mlp(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.norm2(hidden_states)), hidden_states)


Affine = tuple[torch.Tensor, torch.Tensor]
"""Weight [O, I] and bias [O] of a linear layer."""


def _attention_weights(layer: Block, factor: float) -> tuple[Affine, Affine, Affine]:
    """The weights of a block's attention. Scores are multiplied by `factor`, such as log2(e) for 2^(x log2(e)) = e^x.

    Returns:
        qkv, with the scaling in the queries' weights. Then, for CLS alone and for each head: queries and keys as one matrix
        (without the keys' bias, which adds the same to every score), and values and output as another.
    """
    attention = layer.attention
    width, heads = attention.o_proj.in_features, attention.num_attention_heads
    weight, bias = attention.qkv.weight.detach().clone(), attention.qkv.bias.detach().clone()
    weight[:width] *= attention.scaling * factor
    bias[:width] *= attention.scaling * factor
    output, output_bias = attention.o_proj.weight.detach(), attention.o_proj.bias.detach()
    query, key, value = rearrange(weight, "(k h d) i -> k h d i", k=3, h=heads)
    query_bias = rearrange(bias[:width], "(h d) -> h d", h=heads)
    to_scores = torch.einsum("hdi,hdj->hji", query, key).flatten(0, 1), torch.einsum("hd,hdj->hj", query_bias, key)
    from_values = torch.einsum("ohd,hdi->ohi", output.view(width, heads, -1), value).flatten(1)
    return (
        (weight, bias),
        (to_scores[0], to_scores[1].flatten()),
        (from_values, output_bias + output @ bias[2 * width :]),
    )


def weights_of(norm: nn.RMSNorm, layers: Sequence[Block]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """The weights of the final norm and of the last block for CLS alone; then those of each block. `CompiledPictures` and
    `CompiledSounds` take them."""
    _, to_scores, from_values = _attention_weights(layers[-1], math.log2(math.e))
    return [norm.weight, *to_scores, *from_values], [*map(_weights_of, layers)]


def _weights_of(layer: Block) -> list[torch.Tensor]:
    """The parameters of a block, in the order of `compiled_encoder.cpp`."""
    attention, mlp = layer.attention, layer.mlp
    qkv, _, _ = _attention_weights(layer, math.log2(math.e))
    return [
        layer.norm1.weight, layer.norm1.bias, *qkv, attention.o_proj.weight, attention.o_proj.bias,
        layer.norm2.weight, layer.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
    ]  # fmt: skip


def attend(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """bfloat16[B, n, 3 D] -> bfloat16[B, n, D]: softmax(q k^T) v, for queries that hold a factor of log2(e).

    The usual softmax first finds each row's largest score. This one does not. It divides by the row's sum after the second
    product, whose rows are shorter. A row's sum is at least its largest power, and at most n times that. So if the sums are
    within `SAFE`, nothing has overflowed, and what has underflowed is negligible. Otherwise the usual softmax is used.
    """
    batch = len(qkv)
    query, key, value = rearrange(qkv, "b n (k h d) -> k (b h) n d", k=3, h=heads)
    powers = torch.bmm(query, key.transpose(1, 2)).exp2_()
    sums = powers.sum(-1, keepdim=True, dtype=torch.float32)
    least, most = sums.aminmax()
    if least > 1 / SAFE and most < SAFE:  # false for NaN
        attended = torch.bmm(powers, value).div_(sums)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)).float() * math.log(2)
        attended = torch.bmm(scores.softmax(-1).to(value.dtype), value)
    return rearrange(attended, "(b h) n d -> b n (h d)", b=batch)


def _layer_norm(norm: nn.LayerNorm, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias = norm.weight.detach().to(dtype, copy=True), norm.bias.detach().to(dtype, copy=True)
    return lambda hidden_states: F.layer_norm(hidden_states, weight.shape, weight, bias, norm.eps)


def linear(
    weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, rows: int, activation: str | None = None
) -> Callable[..., torch.Tensor]:
    """`f(x)` = activation(x W^T + b) and `f(x, residual)` = x W^T + b + residual, on a private copy of the weights.

    With oneDNN this is one kernel, in a layout for so many `rows`; otherwise it is PyTorch's.
    """
    weight, bias = (tensor.detach().to(dtype, copy=True).contiguous() for tensor in (weight, bias))
    if not (_has_onednn(dtype) and activation in (None, *FUSED)):
        activate = ACT2FN[activation] if activation else nn.Identity()

        def plain(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
            result = activate(F.linear(x, weight, bias))
            return result if residual is None else result + residual

        return plain
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    name, algorithm = FUSED[activation] if activation else ("none", "")

    def fused(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, reordered, bias, name, [], algorithm)
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, reordered, bias, "add")

    return fused


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN is available and enabled, and takes weights of this type on this processor."""
    known = dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    wanted = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled  # type: ignore[no-untyped-call]
    return bool(known and wanted)
