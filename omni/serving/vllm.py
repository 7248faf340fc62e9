"""How vLLM finds omni's models without a flag: the function that its entry point `vllm.general_plugins` names."""


def register() -> None:
    """Run fused models by vLLM's backend for models of transformers; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    ModelRegistry.register_model("OmniForConditionalGeneration", backend)
