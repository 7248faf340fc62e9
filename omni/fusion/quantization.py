"""Which parts of a fused model a quantization leaves alone.

The Thinker is what is large. Towers and projectors are small, and everything that is said about an item passes through
them; so they keep their numbers unless somebody says otherwise.
"""

import copy
from typing import Any

from transformers.quantizers import AutoQuantizationConfig

from omni.registry import registered

LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")
"""What quantization configurations of transformers call the modules that they leave alone."""


def spare_small_parts(quantization: Any) -> Any:
    """A copy of a quantization configuration that says which parts of a fused model it leaves alone.

    Without a list of modules those are every tower and every projector. A list of the caller's own takes their place, and
    names parts as the model does: `image_projector` for what transformers finds as `model.image_projector`. The head, which
    may be the embedding as well, is left alone always.

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
