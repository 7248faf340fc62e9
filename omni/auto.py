"""omni's classes in the Auto tables of transformers.

This imports neither torch nor transformers. A class is registered when somebody imports the module of transformers that
holds its table.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from wrapt import register_post_import_hook, wrap_function_wrapper


def when_imported(auto: str, own: tuple[str, ...], register: Callable[[ModuleType], None]) -> None:
    """Call `register` as soon as the module `auto` is imported.

    Args:
        auto: the module of transformers.
        own: omni's modules that `register` imports. One of them may be in the middle of its own import, because it imports
            transformers. `register` is then called at the end of that import.
        register: called with the module `auto`.
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
    # `register` does not fill the tables in which pipelines and `transformers serve` look up names of classes
    auto.MODEL_MAPPING_NAMES.setdefault("omni_vision", "OmniVisionModel")


def _vision_image_processor(auto: ModuleType) -> None:
    from omni.classification.configuration_classifier import OmniClassifierConfig
    from omni.vision.configuration_vision import OmniVisionConfig
    from omni.vision.image_processing_vision import OmniImageProcessor

    for config in (OmniVisionConfig, OmniClassifierConfig):
        auto.AutoImageProcessor.register(config, OmniImageProcessor, exist_ok=True)


def _no_video_processor(auto: ModuleType) -> None:
    """Tell transformers that there is no video processor. Otherwise it asks to run the checkpoint's code for one."""
    from omni.classification.configuration_classifier import OmniClassifierConfig
    from omni.vision.configuration_vision import OmniVisionConfig

    for config in (OmniVisionConfig, OmniClassifierConfig):
        auto.AutoVideoProcessor.register(config, video_processor_classes={}, exist_ok=True)


def _audio_configuration(auto: ModuleType) -> None:
    from omni.audio.configuration_audio import OmniAudioConfig

    auto.AutoConfig.register(OmniAudioConfig.model_type, OmniAudioConfig, exist_ok=True)


def _audio_model(auto: ModuleType) -> None:
    from omni.audio.configuration_audio import OmniAudioConfig
    from omni.audio.modeling_audio import OmniAudioModel

    auto.AutoModel.register(OmniAudioConfig, OmniAudioModel, exist_ok=True)
    auto.MODEL_MAPPING_NAMES.setdefault("omni_audio", "OmniAudioModel")


def _audio_feature_extractor(auto: ModuleType) -> None:
    from omni.audio.configuration_audio import OmniAudioConfig
    from omni.audio.feature_extraction_audio import OmniFeatureExtractor
    from omni.classification.configuration_classifier import OmniClassifierConfig

    for config in (OmniAudioConfig, OmniClassifierConfig):
        auto.AutoFeatureExtractor.register(config, OmniFeatureExtractor, exist_ok=True)


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


def _classifier_configuration(auto: ModuleType) -> None:
    from omni.classification.configuration_classifier import OmniClassifierConfig

    auto.AutoConfig.register(OmniClassifierConfig.model_type, OmniClassifierConfig, exist_ok=True)


def _classifier_model(auto: ModuleType) -> None:
    from omni.classification.configuration_classifier import OmniClassifierConfig
    from omni.classification.modeling_classifier import OmniForClassification

    auto.AutoModelForImageClassification.register(OmniClassifierConfig, OmniForClassification, exist_ok=True)
    auto.AutoModelForAudioClassification.register(OmniClassifierConfig, OmniForClassification, exist_ok=True)
    for names in (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES):
        names.setdefault("omni_classifier", "OmniForClassification")


def _plugin_configurations(auto: ModuleType) -> None:
    """Have transformers look for unknown model types among the plug-ins, which are loaded only then."""
    from omni.registry import load_modalities, registered

    def look_further(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
        try:
            return wrapped(*args, **kwargs)
        except ValueError:
            before = registered()
            load_modalities()
            if registered() == before:  # no new modality
                raise
        return wrapped(*args, **kwargs)

    for name in ("from_pretrained", "for_model"):
        wrap_function_wrapper(auto.AutoConfig, name, look_further)


def register_when_imported() -> None:
    """Register each class as soon as transformers' table for it is imported."""
    classifier = "omni.classification.configuration_classifier"
    registrations = [
        ("configuration_auto", (), _plugin_configurations),
        ("configuration_auto", ("omni.fusion.configuration_omni",), _fusion_configuration),
        ("modeling_auto", ("omni.fusion.configuration_omni", "omni.fusion.modeling_omni"), _fusion_model),
        ("processing_auto", ("omni.fusion.configuration_omni", "omni.fusion.processing_omni"), _fusion_processor),
        ("configuration_auto", (classifier,), _classifier_configuration),
        ("modeling_auto", (classifier, "omni.classification.modeling_classifier"), _classifier_model),
    ]
    if find_spec("omni.vision") is not None:  # a plug-in like any other, which may be deleted
        vision = "omni.vision.configuration_vision"
        registrations += [
            ("configuration_auto", (vision,), _vision_configuration),
            ("modeling_auto", ("omni.blocks", vision, "omni.vision.modeling_vision"), _vision_model),
            (
                "image_processing_auto",
                (classifier, vision, "omni.vision.image_processing_vision"),
                _vision_image_processor,
            ),
            ("video_processing_auto", (classifier, vision), _no_video_processor),
        ]
    if find_spec("omni.audio") is not None:
        audio = "omni.audio.configuration_audio"
        registrations += [
            ("configuration_auto", (audio,), _audio_configuration),
            ("modeling_auto", ("omni.blocks", audio, "omni.audio.modeling_audio"), _audio_model),
            (
                "feature_extraction_auto",
                (classifier, audio, "omni.audio.feature_extraction_audio"),
                _audio_feature_extractor,
            ),
        ]
    for auto, own, register in registrations:
        when_imported(f"transformers.models.auto.{auto}", own, register)
