"""What transformers has to know about the vision encoder, and what the encoder returns. Nothing here computes."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from omni.blocks import Block, SelfAttention
from omni.checkpoints.pretrained import StrictModel

from .configuration_vision import OmniVisionConfig
from .sizes import take_size


@dataclass
class OmniVisionOutput(BaseModelOutputWithPooling):
    """The encoder's output.

    Attributes:
        last_hidden_state: float[B, 1+N, D], after the final norm; float[B, 1, D] for CLS alone.
        pooler_output: float[B, D], the CLS token.
        hidden_states: float[B, 1+N, D] before the first block and after each block; the last is `last_hidden_state`.
        attentions: float[B, h, 1+N, 1+N] for each block; rows sum to 1.
        cls: float[B, 1, D], the CLS token.
        grid: float[B, N, D], the patch tokens in reading order; None for CLS alone.
    """

    cls: torch.Tensor | None = None
    grid: torch.Tensor | None = None


class OmniVisionPreTrainedModel(StrictModel):
    """Base of `OmniVisionModel`."""

    config: OmniVisionConfig
    config_class = OmniVisionConfig
    base_model_prefix = "vision_model"
    found_as = {
        "AutoConfig": "OmniVisionConfig",
        "AutoModel": "OmniVisionModel",
        "AutoImageProcessor": "OmniImageProcessor",
    }
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["OmniVisionEmbeddings", "Block"]
    _can_record_outputs = {"hidden_states": Block, "attentions": SelfAttention}
    _input_embed_layer = "patch_embeddings"

    def take_size(self, side: int) -> None:
        """Make this an encoder of pictures of another height and width; see `sizes.take_size`."""
        take_size(self, side)
