"""vLLM finds omni's models without a flag: omni's entry point in `vllm.general_plugins` names this function."""


def register() -> None:
    """Run fused models by vLLM's backend for models of transformers; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("OmniForConditionalGeneration", "omni.serving.vllm_model:OmniForVLLM")
