"""A modality that omni has never heard of."""
