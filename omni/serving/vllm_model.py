"""vLLM's backend for models of transformers, with items of any modality that vLLM has a name for.

That backend expects the inputs of pictures and sounds under the names of some models of transformers. Here the bundles say
which inputs belong to a modality, and the model encodes them.
"""

from typing import Any

from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from omni.registry import get_modality


class OmniProcessingInfo(MultiModalProcessingInfo):
    """Tells vLLM how many tokens to reserve for items."""

    def get_max_audio_tokens(self) -> int:
        """The largest number of tokens of a sound, which is that of a prompt, because sounds may have any length."""
        return int(self.ctx.model_config.max_model_len)


class OmniMultiModalProcessor(MultiModalProcessor):
    """Tells vLLM which part of a batch belongs to which modality."""

    def _get_modality_field_names(self, modality: str) -> set[str]:
        return {*get_modality(modality).inputs}


@MULTIMODAL_REGISTRY.register_processor(
    OmniMultiModalProcessor, info=OmniProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class OmniForVLLM(TransformersMultiModalForCausalLM):
    """A fused model whose Thinker runs on vLLM's attention."""

    def embed_multimodal(self, **kwargs: Any) -> list[Any]:
        """The projected tokens of each item, float[n_i, T]."""
        embeddings: list[Any] = []
        for name in self.config.modalities:
            given = {key: kwargs[key] for key in get_modality(name).inputs if kwargs.get(key) is not None}
            if not given:
                continue
            if any(isinstance(value, list) for value in given.values()):  # items of several lengths, without padding
                count = max(map(len, given.values()))
                batches = [{key: value[index][None] for key, value in given.items()} for index in range(count)]
            else:
                batches = [given]
            for batch in batches:
                embeddings += self.model.get_features(name, **batch).pooler_output
        return embeddings
