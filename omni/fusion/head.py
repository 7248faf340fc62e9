"""The output head of a language model's family, asked of the family itself.

Families differ in what they do after the decoder: a bias, a scale, a soft cap. The stock class of transformers is run on
made-up hidden states and compared with what is done here. A family that does more is refused.
"""

import copy
import json
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast


def shape_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some families do to their logits: scale (Cohere), divide (Granite), cap softly (Gemma 2)."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


class _ReplayedOutput(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Families pass on fields of their own (cross attentions, router logits); here they are empty."""


class _Replay(nn.Module):
    """Stands in for a language model's decoder and returns given hidden states."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    @property
    def decoder(self) -> "_Replay":
        """Where OPT's stock class looks for it."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return _ReplayedOutput(last_hidden_state=self.hidden_states)


def stock_head(config: Any) -> nn.Linear:
    """An output head like that of the stock causal language model, if ours gives the same logits as it.

    The stock class runs for real, but on hidden states made up here and with a vocabulary of a few words, so that the
    question "what does this family do after the decoder?" is answered by the family itself, at no cost.

    Raises:
        ValueError: a language model whose head does what we do not; its logits would be silently wrong.
    """
    key = type(config), json.dumps(config.to_dict(), sort_keys=True, default=repr)
    if key not in _STOCK_HEADS:
        _STOCK_HEADS[key] = _ask_stock_head(config)
    in_features, out_features, bias = _STOCK_HEADS[key]
    return nn.Linear(in_features, out_features, bias=bias)


_STOCK_HEADS: dict[tuple[type, str], tuple[int, int, bool]] = {}
"""What was found out, by configuration: asking takes a tenth of loading a small model."""


def _ask_stock_head(config: Any) -> tuple[int, int, bool]:
    """Widths of the head, and whether it has a bias."""
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(_of_one_layer(config))
    head = stock.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"The output head of {type(stock).__name__} is a {type(head).__name__}; only nn.Linear is supported."
        )
    bias = head.bias is not None
    # on the CPU and in float32, also where from_pretrained builds everything else on "meta" or in half precision
    with torch.no_grad(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        hidden_states = torch.randn(1, 3, head.in_features, generator=generator, dtype=torch.float32)
        small = nn.utils.skip_init(  # type: ignore[no-untyped-call]  # draws nothing
            nn.Linear, head.in_features, 8, bias=bias, dtype=torch.float32
        )
        for parameter in small.parameters():  # large logits: a cap would show
            parameter.data = 10 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        setattr(stock, stock.base_model_prefix, _Replay(hidden_states))
        stock.set_output_embeddings(small)
        try:
            expected = stock(inputs_embeds=hidden_states, attention_mask=torch.ones(1, 3)).logits
        except Exception as error:
            raise ValueError(f"{type(stock).__name__} cannot be used as a Thinker: {error}") from error
        same = torch.allclose(expected, shape_logits(small(hidden_states), config), rtol=1e-4, atol=1e-4)
    if not same:
        raise ValueError(
            f"The output head of {type(stock).__name__} does more than a matrix product, and not what omni knows "
            "(scaling, soft capping, bias): its logits would be wrong. Choose another language model."
        )
    return head.in_features, head.out_features, bias


def embedding_name(model: nn.Module) -> str:
    """Name of the Thinker's input embedding weight, which differs from family to family."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def note_ties(model: Any) -> None:
    """Make `tie_word_embeddings` true to the weights: to replace head or embedding alone, as merged adapters do, unties."""
    head, embedding = (
        getattr(part, "weight", None) for part in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    if isinstance(head, torch.Tensor) and isinstance(embedding, torch.Tensor) and head.device.type != "meta":
        tied = head is embedding
        if tied != model.config.tie_word_embeddings:
            model.config.tie_word_embeddings = tied
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _of_one_layer(config: Any) -> Any:
    """A copy with one layer, where all are of one kind: the head is the same, and many layers take long to build."""
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
