"""Attention as two batched products, for language models that learn in bfloat16 on a CPU.

torch's kernel takes two to four times as long there, with its backward pass. Rows are computed one after the other, so that
scores stay within the processor's cache. Heads that share keys are one product, so keys and values are not repeated.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "omni_products"
"""Of this attention among those of transformers."""


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T + mask) v, as transformers calls it.

    Args:
        module: the layer.
        query: float[B, H, n, d].
        key, value: float[B, K, L, d]; each of their heads is for H/K heads of the queries.
        attention_mask: float[B, 1, n, L], added to the scores.
        scaling: of the scores; None for the usual d^-0.5.
        dropout: of the weights.
        options: others that transformers passes and that change nothing here.

    Returns:
        float[B, n, H, d], and no attention maps.
    """
    batch, heads, length, width = query.shape
    shared, group = key.shape[1], heads // key.shape[1]
    query = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch, shared, group * length, width)
    rows = []
    for row in range(batch):
        scores = torch.bmm(query[row], key[row].mT)
        if attention_mask is not None:
            scores = scores + attention_mask[min(row, len(attention_mask) - 1)].repeat(1, group, 1)
        weights = F.dropout(scores.softmax(-1), dropout, module.training)
        rows.append(torch.bmm(weights, value[row]).view(heads, length, width))
    return torch.stack(rows).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
