"""The transformer block that omni's encoders are made of: pre-norm, self-attention and an MLP, each with a residual.

    x + attention(norm(x)), x + mlp(norm(x))

Shapes: B items, n tokens, D width, h heads, d = D/h. The arithmetic is that of
`nn.TransformerEncoderLayer(norm_first=True, activation="gelu")`, whose norms may also be RMSNorms.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


class BlockConfig(Protocol):
    """The settings of an encoder that its blocks read."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float | int
    layer_norm_eps: float
    output_attentions: bool

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""


def attention_of(config: Any, options: Mapping[str, Any]) -> Any:
    """Name of the attention to use: the configured one, or "eager" if attention maps are asked for.

    Any other attention returns no maps, without an error.
    """
    return "eager" if options.get("output_attentions", config.output_attentions) else config._attn_implementation


def padding_mask(
    config: BlockConfig, hidden_states: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
) -> Any:
    """The mask that hides padding from every token, in the form that the attention reads.

    Args:
        config: the encoder's configuration.
        hidden_states: float[B, n, D].
        mask: bool[B, n], true for real tokens; None if all tokens are real.
        options: other arguments of `forward`.

    Returns:
        None; or, for "eager" attention, float[B, 1, 1, n] to add to the scores; or any form that the attention takes.
    """
    if mask is None:
        return None
    if attention_of(config, options) == "eager":
        hidden = ~mask.bool()[:, None, None]
        return torch.zeros_like(hidden, dtype=hidden_states.dtype).masked_fill(
            hidden, torch.finfo(hidden_states.dtype).min
        )
    return create_bidirectional_mask(config=config, inputs_embeds=hidden_states, attention_mask=mask)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention step by step: query, key, value float[B, h, n, d] -> float[B, n, h, d] and maps float[B, h, n, n]."""
    weights = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1)  # for half precision, PyTorch sums in float32
    output = torch.matmul(F.dropout(weights, p=dropout, training=module.training), value)
    return output.transpose(1, 2), weights


class SelfAttention(nn.Module):
    """Multi-head self-attention: every token sees all tokens that the mask does not hide."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        # one product for queries, keys and values; their rows are in this order, as in nn.MultiheadAttention
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        cls_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: float[B, n, D].
            attention_mask: as `padding_mask` makes it; None to hide nothing.
            cls_only: compute the first token alone. This takes no mask.

        Returns:
            float[B, m, D] and maps float[B, h, m, n] or None; m is 1 for `cls_only`, else n.
        """
        assert attention_mask is None or not cls_only
        width = hidden_states.shape[-1]
        if cls_only:
            weight, bias = self.qkv.weight, self.qkv.bias
            query = F.linear(hidden_states[:, :1], weight[:width], bias[:width])
            key, value = F.linear(hidden_states, weight[width:], bias[width:]).chunk(2, dim=-1)
        else:
            query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (
            rearrange(tensor, "b n (h d) -> b h n d", h=self.num_attention_heads) for tensor in (query, key, value)
        )
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_of(self.config, kwargs), eager_attention_forward
        )
        output, maps = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.hidden_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.o_proj(output.flatten(2)), maps


class MLP(nn.Module):
    """Linear, exact GELU, dropout, linear: float[B, n, D] -> float[B, n, D]."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """float[B, n, D] -> float[B, n, D]."""
        return self.fc2(self.dropout(self.activation(self.fc1(hidden_states))))


class Block(GradientCheckpointingLayer):
    """float[B, n, D] -> float[B, n, D], or float[B, 1, D] for the first token alone.

    Args:
        config: the encoder's configuration.
        norm: the class of the block's two norms.
    """

    def __init__(self, config: BlockConfig, norm: type[Any] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config)
        self.norm2 = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        cls_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """float[B, n, D] -> float[B, n, D], or float[B, 1, D] with `cls_only`; see `SelfAttention.forward`."""
        residual = hidden_states[:, :1] if cls_only else hidden_states
        hidden_states, _ = self.attention(self.norm1(hidden_states), attention_mask, cls_only, **kwargs)
        hidden_states = residual + self.dropout(hidden_states)
        return hidden_states + self.dropout(self.mlp(self.norm2(hidden_states)))
