"""Fusion: encoders of any modality, their projectors and a causal language model, as one model of transformers."""
