"""The step of a small language model, with a third of the operations.

Writing is one token after the other. A small language model spends most of such a step between its products, in hundreds of
operations on a few numbers each. `QuickStep` computes the step of the common architecture (RMSNorm, rotary positions,
grouped attention, gated MLP: Llama, Mistral, Qwen2, Qwen3) with a third of the operations. With a C++ compiler it is one
operation (`compiled_layers.py`). Its cache has room for further tokens (`cache.py`).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache

from .cache import RoomyLayer
from .compiled_layers import TOKENS, CompiledLayers, Dimensions, is_possible
from .products import HAS_ONEDNN, ROWS, product

ACTIVATIONS = (nn.SiLU, SiLUActivation)


class Layer(NamedTuple):
    """The modules of one layer. Only Qwen3 has norms of queries and keys; they are None for the others."""

    input_norm: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    query_norm: Any
    key_norm: Any
    output: nn.Linear
    mlp_norm: nn.Module
    gate: nn.Linear
    up: nn.Linear
    activation: nn.Module
    down: nn.Linear

    @classmethod
    def of(cls, layer: Any) -> "Layer":
        """The modules of a decoder layer of transformers."""
        attention, mlp = layer.self_attn, layer.mlp
        norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return cls(
            layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, *norms, attention.o_proj,
            layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj,
        )  # fmt: skip

    def linears(self) -> tuple[nn.Linear, ...]:
        """The seven linear layers."""
        return self.query, self.key, self.value, self.output, self.gate, self.up, self.down


class QuickStep:
    """Takes tokens through a Thinker whose cache holds the earlier ones: one token of each row, or a prompt."""

    def __init__(self, language_model: Any) -> None:
        self.layers = [Layer.of(layer) for layer in language_model.layers]
        self.rotary, self.norm = language_model.rotary_emb, language_model.norm
        attention = language_model.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.compiled: CompiledLayers | None = None

    def compile(self) -> bool:
        """Compile the layers for a few tokens at a time. Returns whether that is possible."""
        first, query_norm = self.layers[0], self.layers[0].query_norm
        dimensions = Dimensions(
            width=first.query.in_features,
            inner=first.gate.out_features,
            heads=first.query.out_features // self.head_dim,
            groups=first.key.out_features // self.head_dim,
            depth=self.head_dim,
            epsilon=first.input_norm.variance_epsilon,  # type: ignore[arg-type]
            head_epsilon=query_norm.variance_epsilon if query_norm is not None else 0.0,
            scaling=self.scaling,
        )
        if isinstance(first.activation, ACTIVATIONS) and is_possible(dimensions):
            layers = [[part for part in layer if part is not layer.activation] for layer in self.layers]
            compiled = CompiledLayers(layers, self.norm, dimensions)
            if compiled.weights() is not None:  # a layer may have other shapes than the first
                self.compiled = compiled
        return self.compiled is not None

    def __call__(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, cache: Cache
    ) -> torch.Tensor:
        """Compute the last hidden state, float[B, n, T], and extend the cache.

        Args:
            hidden: float[B, n, T], the embedded tokens.
            mask: int64[B, L], 1 for tokens that are seen, of all L tokens with the new ones; None for all.
            positions: int64[B, n] of the new tokens; None to count them from the start of the row.
            cache: its layers hold keys and values float[B, G, L - n, D], for G groups of heads.
        """
        (batch, new), dim, held = hidden.shape[:2], self.head_dim, cache.get_seq_length()
        if positions is None:
            positions = torch.arange(held, held + new, device=hidden.device)[None]
        cos, sin = self.rotary(hidden, positions)  # float[B, n, D]
        sin = torch.cat([-sin[..., : dim // 2], sin[..., dim // 2 :]], dim=-1)
        if batch * new <= TOKENS and (done := self._run_compiled(hidden, mask, cos, sin, cache)) is not None:
            return done
        seen, cos, sin = _seen(mask, held, new), cos.unsqueeze(2), sin.unsqueeze(2)
        for own, cached in zip(self.layers, cache.layers, strict=True):
            x = _norm(own.input_norm, hidden)
            query = _linear(own.query, x).view(batch, new, -1, dim)
            key = _linear(own.key, x).view(batch, new, -1, dim)
            value = _linear(own.value, x).view(batch, new, -1, dim)
            heads, groups = query.shape[2], key.shape[2]
            both = torch.cat([query, key], dim=2)
            if own.query_norm is not None:
                weights = own.query_norm.weight.expand(heads, -1), own.key_norm.weight.expand(groups, -1)
                both = _normed(both, own.query_norm.variance_epsilon) * torch.cat(weights)
            both = torch.addcmul(both * cos, both.roll(dim // 2, -1), sin)
            keys, values = cached.update(both[:, :, heads:].transpose(1, 2), value.transpose(1, 2))
            query = both[:, :, :heads]
            if new == 1:  # the heads of a group share keys and values: they are its queries
                query = query.view(batch, groups, heads // groups, dim)
                read = F.scaled_dot_product_attention(query, keys, values, seen, scale=self.scaling)
            else:
                query = query.transpose(1, 2)
                read = F.scaled_dot_product_attention(query, keys, values, seen, scale=self.scaling, enable_gqa=True)
                read = read.transpose(1, 2)
            hidden = hidden + _linear(own.output, read.reshape(batch, new, -1))
            x = _norm(own.mlp_norm, hidden)
            hidden = hidden + _linear(own.down, own.activation(_linear(own.gate, x)) * _linear(own.up, x))
        return _norm(self.norm, hidden)

    def _run_compiled(
        self, hidden: torch.Tensor, mask: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, cache: Cache
    ) -> torch.Tensor | None:
        compiled = self.compiled
        if compiled is None or not hidden.is_cpu or any(type(layer) is not RoomyLayer for layer in cache.layers):
            return None
        if (weights := compiled.weights()) is None:
            return None
        (batch, new, _), held = hidden.shape, cache.get_seq_length()
        like = hidden.new_empty(batch, compiled.groups, new, self.head_dim)
        caches = [tensor for layer in cache.layers for tensor in layer.extend(like, like)]
        seen = None if mask is None or mask.all() else mask.bool()
        cos, sin = (part.expand(batch, new, -1) for part in (cos, sin))
        return compiled(weights, hidden, seen, cos, sin, caches, held)


def _seen(mask: torch.Tensor | None, held: int, new: int) -> torch.Tensor | None:
    """bool[B, 1, n, L], true where a new token sees another; None for a single token that sees everything."""
    mask = None if mask is None or mask.all() else mask[:, None, None].bool()
    if new == 1:
        return mask
    places = torch.arange(held + new, device="cpu")[None]
    own = places[:, held:].T
    # padding sees itself, since the average of nothing is not a number
    return (places <= own)[None, None] if mask is None else (mask & (places <= own)) | (places == own)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last axis, with its weight."""
    return _normed(x, norm.variance_epsilon) * norm.weight


def _normed(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x * x) + epsilon) over the last axis. The mean is one product of each row with itself."""
    rows = x.reshape(-1, 1, x.shape[-1])
    squares = torch.baddbmm(x.new_full((1, 1, 1), epsilon), rows, rows.mT, alpha=1 / x.shape[-1])
    return (rows * squares.rsqrt_()).view(x.shape)


def _linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer's product, float[B, n, I] -> float[B, n, O], in the fastest way for this number of rows."""
    rows = x.shape[0] * x.shape[1]
    if HAS_ONEDNN and rows >= ROWS:
        return product(x, linear.weight, linear.bias)
    if rows == 1:
        return F.linear(x, linear.weight, linear.bias)
    # for 4 rows, W x^T is faster than x W^T by a third, if x is stored row by row
    few = torch.mm(linear.weight, x.reshape(rows, -1).contiguous().t()).t()
    return (few if linear.bias is None else few + linear.bias).view(*x.shape[:2], -1)
