"""omni: encoders of any modality plugged into any causal language model of transformers.

Importing it is cheap, and enough: `AutoModel.from_pretrained` and its relatives know omni's classes from then on (`auto`).
The public names below are loaded when they are first used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from omni.auto import register_when_imported
from omni.modality import Modality
from omni.registry import declare_builtin, modalities, register_modality
from omni.worlds import declare_world

if TYPE_CHECKING:
    from omni.audio.configuration_audio import OmniAudioConfig
    from omni.audio.feature_extraction_audio import OmniFeatureExtractor
    from omni.audio.modeling_audio import OmniAudioModel
    from omni.fusion.configuration_omni import OmniConfig
    from omni.fusion.modeling_omni import OmniForConditionalGeneration, OmniModel
    from omni.fusion.processing_omni import OmniProcessor
    from omni.vision.configuration_vision import OmniVisionConfig
    from omni.vision.image_processing_vision import OmniImageProcessor
    from omni.vision.modeling_vision import OmniVisionModel

__version__ = "0.1.0"

__all__ = [
    "Modality",
    "OmniAudioConfig",
    "OmniAudioModel",
    "OmniConfig",
    "OmniFeatureExtractor",
    "OmniForConditionalGeneration",
    "OmniImageProcessor",
    "OmniModel",
    "OmniProcessor",
    "OmniVisionConfig",
    "OmniVisionModel",
    "modalities",
    "register_modality",
]

_LAZY = {
    "OmniAudioConfig": "omni.audio.configuration_audio",
    "OmniAudioModel": "omni.audio.modeling_audio",
    "OmniConfig": "omni.fusion.configuration_omni",
    "OmniFeatureExtractor": "omni.audio.feature_extraction_audio",
    "OmniForConditionalGeneration": "omni.fusion.modeling_omni",
    "OmniImageProcessor": "omni.vision.image_processing_vision",
    "OmniModel": "omni.fusion.modeling_omni",
    "OmniProcessor": "omni.fusion.processing_omni",
    "OmniVisionConfig": "omni.vision.configuration_vision",
    "OmniVisionModel": "omni.vision.modeling_vision",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


declare_builtin("image", "omni.vision.plugin:image")
if find_spec("omni.audio") is not None:
    declare_builtin("audio", "omni.audio.plugin:audio")
declare_world("scenes", "omni.scenes.world:scenes")
register_when_imported()
if find_spec("omni.fast") is not None:  # speed alone: without it the rest works, only slower
    import_module("omni.fast.install").install_when_imported()
