"""The plug-in for sounds: the audio encoder, its feature extractor, and how files become sounds."""
