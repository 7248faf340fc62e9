"""omni: encoders of any modality plugged into any causal language model of transformers.

Importing it is cheap, and enough: `AutoModel.from_pretrained` and its relatives know omni's classes from then on.
Nothing heavy is loaded before it is used: the public names below on first access, the registrations as soon as the module of
transformers that they concern is imported.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from omni.registry import Modality, declare_builtin, modalities, register_modality

if TYPE_CHECKING:
    from omni.fusion.configuration_omni import OmniConfig
    from omni.fusion.modeling_omni import OmniForConditionalGeneration, OmniModel
    from omni.fusion.processing_omni import OmniProcessor
    from omni.vision.configuration_vision import OmniVisionConfig
    from omni.vision.image_processing_vision import OmniImageProcessor
    from omni.vision.modeling_vision import OmniVisionModel

__version__ = "0.1.0"

__all__ = [
    "Modality",
    "OmniConfig",
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
    "OmniConfig": "omni.fusion.configuration_omni",
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


# --- The built-in plug-in, and omni's classes in transformers' tables -------------------------------------------------

declare_builtin("image", "omni.vision.plugin:image")


def _register_when_imported(auto: str, own: tuple[str, ...], register: Callable[[ModuleType], None]) -> None:
    """Call `register` once transformers' module `auto` is there, importing omni's modules `own` for it.

    If one of those is being imported at that moment (it may be what imports transformers), wait until it is complete.
    """

    def attempt(loaded: ModuleType) -> None:
        modules = {name: sys.modules.get(name) for name in (auto, *own) if name != loaded.__name__}
        busy = any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules.values())
        if auto in sys.modules and not busy:
            register(sys.modules[auto])

    for name in (auto, *own):
        register_post_import_hook(attempt, name)


def _vision_configuration(auto: ModuleType) -> None:
    from omni.vision.configuration_vision import OmniVisionConfig

    auto.AutoConfig.register(OmniVisionConfig.model_type, OmniVisionConfig, exist_ok=True)


def _vision_model(auto: ModuleType) -> None:
    from omni.vision.configuration_vision import OmniVisionConfig
    from omni.vision.modeling_vision import OmniVisionModel

    auto.AutoModel.register(OmniVisionConfig, OmniVisionModel, exist_ok=True)
    # pipelines and `transformers serve` look the names of classes up in tables that `register` does not fill
    auto.MODEL_MAPPING_NAMES.setdefault("omni_vision", "OmniVisionModel")


def _vision_image_processor(auto: ModuleType) -> None:
    from omni.vision.configuration_vision import OmniVisionConfig
    from omni.vision.image_processing_vision import OmniImageProcessor

    auto.AutoImageProcessor.register(OmniVisionConfig, OmniImageProcessor, exist_ok=True)


def _fusion_configuration(auto: ModuleType) -> None:
    from omni.fusion.configuration_omni import OmniConfig

    auto.AutoConfig.register(OmniConfig.model_type, OmniConfig, exist_ok=True)


def _fusion_model(auto: ModuleType) -> None:
    from omni.fusion.configuration_omni import OmniConfig
    from omni.fusion.modeling_omni import OmniForConditionalGeneration, OmniModel

    auto.AutoModel.register(OmniConfig, OmniModel, exist_ok=True)
    auto.AutoModelForImageTextToText.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
    auto.AutoModelForMultimodalLM.register(OmniConfig, OmniForConditionalGeneration, exist_ok=True)
    auto.MODEL_MAPPING_NAMES.setdefault("omni", "OmniModel")
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.setdefault("omni", "OmniForConditionalGeneration")
    auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.setdefault("omni", "OmniForConditionalGeneration")


def _fusion_processor(auto: ModuleType) -> None:
    from omni.fusion.configuration_omni import OmniConfig
    from omni.fusion.processing_omni import OmniProcessor

    auto.AutoProcessor.register(OmniConfig, OmniProcessor, exist_ok=True)


_REGISTRATIONS = [
    ("configuration_auto", ("omni.fusion.configuration_omni",), _fusion_configuration),
    ("modeling_auto", ("omni.fusion.configuration_omni", "omni.fusion.modeling_omni"), _fusion_model),
    ("processing_auto", ("omni.fusion.configuration_omni", "omni.fusion.processing_omni"), _fusion_processor),
]
if find_spec("omni.vision") is not None:  # a plug-in like any other: without it the rest still works
    _vision = "omni.vision.configuration_vision"
    _REGISTRATIONS += [
        ("configuration_auto", (_vision,), _vision_configuration),
        ("modeling_auto", (_vision, "omni.vision.modeling_vision"), _vision_model),
        ("image_processing_auto", (_vision, "omni.vision.image_processing_vision"), _vision_image_processor),
    ]
for _auto, _own, _register in _REGISTRATIONS:
    _register_when_imported(f"transformers.models.auto.{_auto}", _own, _register)
