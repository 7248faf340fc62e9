"""The encoder that a recipe trains."""

from typing import Any

from transformers import PreTrainedModel

from omni.checkpoints.folder import expect_model
from omni.fusion.configuration_omni import OmniConfig
from omni.registry import get_modality
from omni.training.recipe import said_by_recipe
from omni.training.sections import EncoderSection


def build_encoder(section: EncoderSection, name: str = "image") -> tuple[PreTrainedModel, Any]:
    """The encoder of a modality, new or from a folder, and its preprocessor.

    Raises:
        RecipeError: the folder or the configuration cannot be used.
    """
    modality = get_modality(name)
    if section.encoder is None:
        with said_by_recipe("model.config", section.config):
            return modality.model_class(modality.config_class(**section.config)), modality.preprocessor_class()
    with said_by_recipe("model.encoder", section.encoder):
        expect_model(section.encoder, modality.config_class.model_type, OmniConfig.model_type)
        encoder = modality.model_class.from_pretrained(section.encoder, **section.config)
        return encoder, modality.preprocessor_class.from_pretrained(section.encoder)
