"""An encoder of pictures with what it needs around it, as the checkpoint has it; nothing here is made faster."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from omni.checkpoints.folder import CheckpointError, expect_folder, reason_of
from omni.checkpoints.seal import MODEL, verify_files
from omni.fusion.configuration_omni import OmniConfig
from omni.fusion.modeling_omni import OmniModel
from omni.fusion.processing_omni import OmniProcessor
from omni.projectors import compute_dtype
from omni.registry import get_modality

Tokens = dict[str, torch.Tensor]
"""By name: `cls` float[B, 1, D], `grid` float[B, N, D], and of a fused model `projected` float[B, n, T]."""


@dataclass(frozen=True)
class Encoder:
    """A vision encoder with its image processor.

    Attributes:
        pooled: whether its `pooler_output` is trained.
        fused: the model that it is part of, if it is.
    """

    model: PreTrainedModel
    image_processor: Any
    pooled: bool = True
    fused: OmniModel | None = None

    @property
    def side(self) -> int:
        """Height and width of the pictures that it was made for."""
        side = getattr(self.model.config, "image_size", None) or self.image_processor.size["height"]
        return int(side if isinstance(side, int) else side[0])

    def untrained(self, seed: int) -> "Encoder":
        """The same architecture with new random weights, the same ones for every seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModel.from_config(copy.deepcopy(self.model.config), dtype=self.model.dtype)
        return replace(self, model=model.to(self.model.device).eval(), pooled=True)

    def prepare(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """float[B, 3, H, W]"""
        pixels = self.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device, self.model.dtype)

    def grid_shape(self, pixel_values: torch.Tensor) -> tuple[int, ...]:
        """How many patches there are down and across prepared pictures."""
        return tuple(get_modality("image").grid_shapes(self.model.config, {"pixel_values": pixel_values})[0])

    @torch.inference_mode()
    def encode(self, pixel_values: torch.Tensor) -> Tokens:
        """What the encoder says of prepared pictures."""
        encoded = self.model(pixel_values=pixel_values)
        if not self.pooled:
            encoded["pooler_output"] = None
        return self.name(encoded, pixel_values)

    @torch.inference_mode()
    def name(self, encoded: Any, pixel_values: torch.Tensor) -> Tokens:
        """The tokens of an output by their names, and projected as the fused model does it."""
        shape = self.grid_shape(pixel_values)
        tokens: Tokens = get_modality("image").read(encoded, math.prod(shape))
        wanted = self.fused.config.modalities["image"]["output"].split("+") if self.fused else []
        if self.fused and tokens.keys() >= {*wanted}:
            dtype = compute_dtype(self.fused.image_projector)
            handed = {name: tokens[name].to(dtype=dtype) for name in wanted}
            tokens = {**tokens, "projected": self.fused.image_projector(handed, shape)}
        return tokens


def load_encoder(checkpoint: str | Path) -> Encoder:
    """Load a vision encoder from a folder, omni's or one of transformers; nothing is fetched from anywhere.

    Of a model of several parts, such as CLIP or a fused model, its vision tower is taken.

    Raises:
        CheckpointError: no encoder of pictures in the folder, no image processor, one that makes pictures which the
            encoder does not take, or weights that are not whole.
    """
    folder, modality = Path(checkpoint), get_modality("image")
    expect_folder(folder)  # transformers would look for it on the internet, and speak of that
    try:
        verify_files(folder, MODEL)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if isinstance(config, OmniConfig):
            encoder = _of_fused(folder, config)
        else:
            config = getattr(config, "vision_config", None) or config
            if config.model_type == modality.config_class.model_type:
                model, pooled = modality.model_class.from_pretrained(folder), True
            else:
                model, pooled = _of_transformers(folder, config)
            if model.main_input_name != "pixel_values":
                raise ValueError(
                    f"a {type(model).__name__} reads {model.main_input_name!r}, expected a model of pictures."
                )
            encoder = Encoder(model.eval(), AutoImageProcessor.from_pretrained(folder), pooled)
        encoder.encode(encoder.prepare([Image.new("RGB", (encoder.side, encoder.side))]))
    except Exception as error:  # what a folder holds is read by the code of others, which says anything about it
        said = f"The checkpoint {str(folder)!r} cannot be loaded as an encoder: {reason_of(error)}"
        raise CheckpointError(said) from error
    return encoder


def _of_fused(folder: Path, config: OmniConfig) -> Encoder:
    if "image" not in config.modalities:
        raise ValueError(f"its modalities are {sorted(config.modalities)}, expected one named 'image'.")
    fused = OmniModel.from_pretrained(folder).eval()
    return Encoder(fused.image_tower, OmniProcessor.from_pretrained(folder).preprocessors["image"], fused=fused)


def _of_transformers(folder: Path, config: Any) -> tuple[PreTrainedModel, bool]:
    """A tower, and whether its pooler is trained: classifiers are saved without ViT's, which comes after what is read."""
    model, report = AutoModel.from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lost := [name for name in lacking if not name.startswith("pooler.")]:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(f"its weights lack or mis-shape {', '.join(lost[:5])}{more}.")
    return model, not lacking
