"""Quantization of a fused model: the Thinker alone, unless the caller asks for more.

The Thinker is the large part. Towers and projectors are small, and every answer about an item depends on them. So they are
not quantized unless the caller asks for it.
"""

import copy
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

from omni.registry import registered

LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Names that transformers' quantization configurations have for the list of modules to leave alone."""


def spare_small_parts(quantization: Any) -> Any:
    """A copy of a quantization configuration that lists the parts of a fused model to leave alone.

    By default these are all towers and projectors. If the caller gives a list, it counts instead. It names parts as the
    model does: `image_projector` stands for `model.image_projector`. The head is always left alone, because it may share
    its weight with the embedding.

    Args:
        quantization: of transformers, such as `BitsAndBytesConfig`, or its dictionary.
    """
    if isinstance(quantization, dict):
        quantization = AutoQuantizationConfig.from_dict(quantization)
    quantization = copy.deepcopy(quantization)
    parts = [f"{modality.name}_{part}" for modality in registered() for part in ("tower", "projector")]
    for key in LISTS:
        if hasattr(quantization, key):
            spared = getattr(quantization, key)
            spared = parts if spared is None else spared
            inside = [f"model.{part}" for part in (*parts, "language_model") if part in spared]
            setattr(quantization, key, sorted({*spared, *inside, "lm_head"}))
    return quantization
