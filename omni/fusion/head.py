"""The output head of a Thinker: the same logits as the stock class of transformers, or an error.

Language models differ in what follows their last layer: a bias, a scale, a soft cap. So the stock class runs once, on
random hidden states, and its logits are compared with those of this file. A model whose head does more is refused, and so
is one that has no cache of keys and values.
"""

import copy
import inspect
import json
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .signature import CACHE


def shape_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Scale (Cohere, Falcon H1), divide (Granite) or cap (Gemma 2) logits float[..., V], as the configuration says."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class _ReplayedOutput(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """None for fields of some families, such as router logits."""


class _Replay(nn.Module):
    """Takes the place of a language model's layers and returns given hidden states.

    Args:
        hidden_states: float[B, L, T].
        scale: Falcon H1's stock class looks for it here.
    """

    def __init__(self, hidden_states: torch.Tensor, scale: float | None) -> None:
        super().__init__()
        self.hidden_states, self.lm_head_multiplier = hidden_states, scale

    @property
    def decoder(self) -> "_Replay":
        """OPT's stock class looks here."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _ReplayedOutput(last_hidden_state=self.hidden_states)


def stock_head(config: Any) -> nn.Linear:
    """A linear layer from T to V, like the head of the stock causal language model. `shape_logits` completes it.

    The stock class runs on random hidden states with a vocabulary of eight words, which takes little time.

    Raises:
        ValueError: the stock head computes something else, so that the logits would be wrong.
    """
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=repr)
    if key not in _STOCK_HEADS:
        _STOCK_HEADS[key] = _ask_stock_head(config)
    in_features, out_features, bias = _STOCK_HEADS[key]
    return nn.Linear(in_features, out_features, bias=bias)


_STOCK_HEADS: dict[tuple[type, str], tuple[int, int, bool]] = {}
"""Heads by configuration. To find one takes a tenth of the time of loading a small model."""


def _ask_stock_head(config: Any) -> tuple[int, int, bool]:
    """The head's input and output widths, and whether it has a bias."""
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(_of_one_layer(config))
    name, head = type(stock).__name__, stock.get_output_embeddings()
    if not hasattr(stock, stock.base_model_prefix):
        raise ValueError(f"{name} keeps its layers elsewhere than omni looks for them. Choose another language model.")
    if not _has_cache(stock, config):
        raise ValueError(
            f"{name} has no cache of keys and values, which an answer is written with. Choose another language model."
        )
    if not isinstance(head, nn.Linear):
        raise ValueError(f"The output head of {name} is a {type(head).__name__}; only nn.Linear is supported.")
    bias = head.bias is not None
    # on the CPU and in float32, even while from_pretrained builds everything else on "meta" or in half precision
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(1, 3, head.in_features, generator=generator, dtype=torch.float32)
        small = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # draws nothing
            nn.Linear, head.in_features, 8, bias=bias, dtype=torch.float32
        )
        for parameter in small.parameters():  # large logits: a cap would show
            parameter.data = 10 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        setattr(stock, stock.base_model_prefix, _Replay(hidden_states, getattr(config, "lm_head_multiplier", None)))
        stock.set_output_embeddings(small)
        try:
            expected = stock(inputs_embeds=hidden_states, attention_mask=torch.ones(1, 3)).logits
        except Exception:  # its other parts are on "meta", where nothing is computed
            expected = torch.full((1, 3, 8), torch.nan)
        same = torch.allclose(expected, shape_logits(small(hidden_states), config), rtol=1e-4, atol=1e-4)
    if not same:
        raise ValueError(
            f"The output head of {name} does more than a matrix product, and not what omni knows "
            "(scaling, soft capping, bias): its logits would be wrong. Choose another language model."
        )
    return head.in_features, head.out_features, bias


def _has_cache(stock: Any, config: Any) -> bool:
    """Whether a language model has a cache of keys and values, which knows how many tokens it has read."""
    try:
        DynamicCache(config=config).get_seq_length()
    except ValueError:  # it has states alone, as Mamba does
        return False
    return not {CACHE, "past_key_values"}.isdisjoint(inspect.signature(stock.base_model.forward).parameters)


def embedding_name(model: nn.Module) -> str:
    """Name of the weight of the input embedding, which differs from family to family."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def note_ties(model: Any) -> None:
    """Set `tie_word_embeddings` by whether head and embedding share their weight. Merging adapters may untie them."""
    head, embedding = (
        getattr(part, "weight", None) for part in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if isinstance(head, torch.Tensor) and isinstance(embedding, torch.Tensor) and head.device.type != "meta":
        tied = head is embedding
        if tied != model.config.tie_word_embeddings:
            model.config.tie_word_embeddings = tied
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _of_one_layer(config: Any) -> Any:
    """A copy of a configuration with one layer, if all layers are alike. The head is the same, and building is quick."""
    config = copy.deepcopy(config)
    per_layer = [
        key
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == getattr(config, "num_hidden_layers", None)
    ]
    if per_layer in ([], ["layer_types"]):
        config.num_hidden_layers = 1
        if per_layer:
            config.layer_types = config.layer_types[:1]
    return config
