"""omni: encoders of any modality plugged into any causal language model of transformers.

    model = omni.load("checkpoints/omni_tiny")
    model.ask("examples/scene.png", "what color is the circle")   # an answer, and in a notebook the picture
    model.embed("examples/scene.png")                             # a vector

load, ask, embed                         use a checkpoint in Python and in notebooks; `Loaded`, `Reply`
Omni...Config, Omni...Model, Omni...     models and processors of transformers
Modality, register_modality, modalities  an encoder of your own

After `import omni`, which is cheap, transformers' Auto classes know omni's classes. `dir(omni)` lists the public names. Each
is loaded when it is first used: `help(omni.load)`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from omni.auto import register_when_imported
from omni.modality import Modality as Modality
from omni.registry import declare_builtin
from omni.registry import modalities as modalities
from omni.registry import register_modality as register_modality
from omni.worlds import declare_world

if TYPE_CHECKING:
    from omni.audio.configuration_audio import OmniAudioConfig as OmniAudioConfig
    from omni.audio.feature_extraction_audio import OmniFeatureExtractor as OmniFeatureExtractor
    from omni.audio.modeling_audio import OmniAudioModel as OmniAudioModel
    from omni.classification.configuration_classifier import OmniClassifierConfig as OmniClassifierConfig
    from omni.classification.modeling_classifier import OmniForClassification as OmniForClassification
    from omni.fusion.configuration_omni import OmniConfig as OmniConfig
    from omni.fusion.modeling_omni import OmniForConditionalGeneration as OmniForConditionalGeneration
    from omni.fusion.modeling_omni import OmniModel as OmniModel
    from omni.fusion.processing_omni import OmniProcessor as OmniProcessor
    from omni.notebook import Loaded as Loaded
    from omni.notebook import Reply as Reply
    from omni.notebook import ask as ask
    from omni.notebook import embed as embed
    from omni.notebook import load as load
    from omni.vision.configuration_vision import OmniVisionConfig as OmniVisionConfig
    from omni.vision.image_processing_vision import OmniImageProcessor as OmniImageProcessor
    from omni.vision.modeling_vision import OmniVisionModel as OmniVisionModel

__version__ = "0.1.0"

_LAZY = {
    "Loaded": "omni.notebook",
    "OmniAudioConfig": "omni.audio.configuration_audio",
    "OmniAudioModel": "omni.audio.modeling_audio",
    "OmniClassifierConfig": "omni.classification.configuration_classifier",
    "OmniConfig": "omni.fusion.configuration_omni",
    "OmniFeatureExtractor": "omni.audio.feature_extraction_audio",
    "OmniForClassification": "omni.classification.modeling_classifier",
    "OmniForConditionalGeneration": "omni.fusion.modeling_omni",
    "OmniImageProcessor": "omni.vision.image_processing_vision",
    "OmniModel": "omni.fusion.modeling_omni",
    "OmniProcessor": "omni.fusion.processing_omni",
    "OmniVisionConfig": "omni.vision.configuration_vision",
    "OmniVisionModel": "omni.vision.modeling_vision",
    "Reply": "omni.notebook",
    "ask": "omni.notebook",
    "embed": "omni.notebook",
    "load": "omni.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """The public names. (With an `__all__`, `help` would print everything that the classes inherit.)"""
    return sorted([*_LAZY, "Modality", "modalities", "register_modality"])


declare_builtin("image", "omni.vision.plugin:image")
if find_spec("omni.audio") is not None:
    declare_builtin("audio", "omni.audio.plugin:audio")
declare_world("scenes", "omni.scenes.world:scenes")
register_when_imported()
if find_spec("omni.fast") is not None:  # omni works without it, only slower
    import_module("omni.fast.install").install_when_imported()
