"""Long searches for inputs that omni gets wrong. The inputs are random; the same seed draws them again."""
