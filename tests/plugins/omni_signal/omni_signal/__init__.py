"""A modality that omni does not know."""
