"""The plug-in for pictures: the vision encoder, its image processor, and how files become pictures."""
