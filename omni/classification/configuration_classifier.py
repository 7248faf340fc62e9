"""Configuration of a classifier: the encoder's own configuration, what the head reads of it, and the names of the classes.

OmniClassifierConfig(encoder_config={"model_type": "omni_vision"}, id2label={0: "robin", 1: "wren"})
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from omni.checkpoints.configuration import StrictConfig
from omni.registry import get_modality

OF_FOLDER = ("transformers_version", "auto_map", "fingerprints", "architectures", "dtype")
"""Keys of an encoder's configuration that describe its own folder."""


@strict
class OmniClassifierConfig(StrictConfig):
    """Configuration of `OmniForClassification`.

    Args:
        modality: the registered name of what is classified.
        encoder_config: a configuration or its dictionary, of the registered encoder or of any other model of that kind.
        output: what the head reads: "cls", "grid" (the mean over the grid) or "cls+grid" (one after the other).
        id2label: the names of the classes by number; `label2id` follows from it.
        initializer_range: standard deviation of the head's initial weights.
        fingerprints: hash of the saved weights.

    Raises:
        ValueError: a key, the modality, its output or the model type of the encoder is unknown.
        huggingface_hub.errors.StrictDataclassError: a value has the wrong type.
    """

    model_type = "omni_classifier"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder_config": AutoConfig}

    modality: str = "image"
    encoder_config: Any = None
    output: str = "cls+grid"
    initializer_range: float = 0.02
    fingerprints: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        modality = get_modality(self.modality)
        if not isinstance(self.encoder_config, PreTrainedConfig):
            values: Mapping[str, Any] = {"model_type": modality.config_class.model_type, **(self.encoder_config or {})}
            self.encoder_config = AutoConfig.for_model(**values)
        if self.output not in modality.outputs:
            raise ValueError(f"Unknown output {self.output!r} for {self.modality!r}; known: {modality.outputs}.")
        super().__post_init__(**kwargs)
        self.label2id = {name: number for number, name in self.id2label.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON. The encoder's settings are those of this folder."""
        return {**super().to_dict(), "encoder_config": self._encoder(self.encoder_config.to_dict())}

    def to_diff_dict(self) -> dict[str, Any]:
        """As written to disk: only values that differ from the defaults of their part."""
        encoder = self._encoder(self.encoder_config.to_diff_dict())
        return {**super().to_diff_dict(), "modality": self.modality, "encoder_config": encoder}

    @staticmethod
    def _encoder(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in OF_FOLDER}
