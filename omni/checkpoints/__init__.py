"""Weights on disk: strict loading, a fingerprint of each part, and what a saved folder says of itself."""
