"""The classifier: what an encoder says of an item, pooled, and a linear layer with a score for each class.

Shapes: B items, item i with N_i places in its grid; D width of the encoder, C classes.

    pixel_values (B, 3, H, W) -> encoder: cls (B, 1, D), grid (N_i, D) -> cls, mean of the grid (B, 2D) -> logits (B, C)
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from omni.checkpoints.pretrained import StrictModel
from omni.fusion.encoding import run_tower
from omni.registry import get_modality

from .configuration_classifier import OmniClassifierConfig


@dataclass
class OmniClassifierOutput(ModelOutput):
    """Output of `OmniForClassification`.

    Attributes:
        loss: float, mean cross-entropy over the items; None without labels.
        logits: float[B, C].
        hidden_states, attentions: the encoder's, if they are asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class OmniForClassification(StrictModel):
    """An encoder of any registered modality with a linear head. transformers' pipelines take it for one of its own.

    Attributes:
        encoder: reads one item of the modality `config.modality`.
        classifier: the head.
    """

    config: OmniClassifierConfig
    config_class = OmniClassifierConfig
    base_model_prefix = "encoder"
    found_as = {
        "AutoConfig": "OmniClassifierConfig",
        "AutoModelForImageClassification": "OmniForClassification",
        "AutoModelForAudioClassification": "OmniForClassification",
    }

    accepts_loss_kwargs = False  # `Trainer` would pass some on to the encoder

    def __init__(self, config: OmniClassifierConfig) -> None:
        super().__init__(config)
        self.encoder = get_modality(config.modality).build_tower(config.encoder_config)
        self.main_input_name = self.encoder.main_input_name
        outputs = config.output.split("+")
        self.classifier = nn.Linear(len(outputs) * config.encoder_config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> OmniClassifierOutput:
        """Score the classes of B items.

        Args:
            labels: int64[B], the right classes.
            inputs: what the encoder reads, by the names of its own arguments or of the modality's batch keys, such as
                `pixel_values` float[B, 3, H, W].

        Raises:
            ValueError: an input is missing, or the encoder has no such output.
        """
        keys = {argument: key for key, argument in get_modality(self.config.modality).arguments.items()}
        batch = {keys.get(name, name): value for name, value in inputs.items()}
        section = {"encoder": self.config.encoder_config, "output": self.config.output}
        encoded, items = run_tower(self.config.modality, section, self.encoder, batch)
        pooled = [torch.cat([tokens.mean(0) for tokens in item.tokens.values()]) for item in items]
        logits = self.classifier(torch.stack(pooled).to(self.classifier.weight.dtype))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return OmniClassifierOutput(loss, logits, encoded.get("hidden_states"), encoded.get("attentions"))
