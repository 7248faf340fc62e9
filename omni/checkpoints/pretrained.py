"""The base of omni's models: strict loading, and what transformers has to know about all of them."""

from transformers.modeling_utils import PreTrainedModel

from .strict import StrictLoadingMixin


class StrictModel(StrictLoadingMixin, PreTrainedModel):
    """A `PreTrainedModel` that loads strictly, and computes with any attention of transformers."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
