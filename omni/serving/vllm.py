"""Registers omni's models with vLLM. vLLM finds the function by omni's entry point in `vllm.general_plugins`."""


def register() -> None:
    """Have vLLM run fused models on its backend for models of transformers. vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("OmniForConditionalGeneration", "omni.serving.vllm_model:OmniForVLLM")
