"""The vision encoder and its image processor: the first plug-in, and one that knows nothing of the rest of omni."""
