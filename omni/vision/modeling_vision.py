"""The vision encoder: a ViT that turns a picture into one summary token (`cls`) and one token per patch (`grid`).

Shapes: B pictures, C channels, H x W pixels, P patch size, N = H/P * W/P patches, D width, h heads, d = D/h.

    pixel_values (B, C, H, W)
      -> patch embedding, Conv2d P x P with stride P      (B, D, H/P, W/P)      seed, layer 1
      -> sequence                                         (B, N, D)             layer 2
      -> CLS in front                                     (B, 1+N, D)           layer 3
      -> plus learned positions                           (B, 1+N, D)           layer 4
      -> blocks: x + attention(norm(x)), x + mlp(norm(x)) (B, 1+N, D)           layers 5, 6
      -> RMSNorm                                          (B, 1+N, D)           layer 7
      -> cls (B, 1, D), grid (B, N, D)                                          layer 8

The blocks are those of `omni.blocks` (Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; final RMSNorm: Zhang and
Sennrich, 2019).
"""

import torch
from einops import rearrange
from torch import nn
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from omni.blocks import Block

from .configuration_vision import OmniVisionConfig
from .pretrained import OmniVisionOutput, OmniVisionPreTrainedModel
from .sizes import expect_pictures, stretched


class OmniVisionEmbeddings(nn.Module):
    """Patches, CLS and positions: float[B, C, H, W] -> float[B, 1+N, D] (seed, layers 1 to 4)."""

    def __init__(self, config: OmniVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embeddings = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.num_patches, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """float[B, C, H, W] -> float[B, 1+N, D]."""
        expect_pictures(pixel_values, self.config, interpolate_pos_encoding)
        patches = self.patch_embeddings(pixel_values.to(self.patch_embeddings.weight.dtype))  # (B, D, H/P, W/P)
        positions = stretched(self.position_embeddings, self.config, *patches.shape[2:])  # (1, 1+N, D)
        patches = rearrange(patches, "b d h w -> b (h w) d")
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1) + positions


class OmniVisionModel(OmniVisionPreTrainedModel):
    """The encoder of the seed. Its ViT-Tiny configuration has 916,992 parameters."""

    def __init__(self, config: OmniVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = OmniVisionEmbeddings(config)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, OmniVisionEmbeddings):
            init.zeros_(module.cls_token)
            init.zeros_(module.position_embeddings)

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        cls_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> OmniVisionOutput:
        """Encode pictures.

        Args:
            pixel_values: float[B, C, H, W] as the image processor makes them.
            interpolate_pos_encoding: accept an H or W other than `image_size`, and interpolate the positions in 2-D.
            cls_only: compute the last block for the CLS token alone. The CLS token is the same; `grid` is None.

        Raises:
            ValueError: the pictures have another number of channels, another size without `interpolate_pos_encoding`, or
                a size that is no multiple of the patch size.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            hidden_states = layer(hidden_states, cls_only=cls_only and i == last, **kwargs)
        hidden_states = self.norm(hidden_states)
        return OmniVisionOutput(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            cls=hidden_states[:, :1],
            grid=None if cls_only else hidden_states[:, 1:],
        )
