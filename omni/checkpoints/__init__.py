"""Checkpoints on disk: strict loading, fingerprints of the weights, seals of the other files, and the model card."""
