"""omni: encoders of any modality plugged into any causal language model of transformers."""

from omni.registry import Modality, declare_builtin, modalities, register_modality

declare_builtin("image", "omni.image:image")

__all__ = ["Modality", "modalities", "register_modality"]
