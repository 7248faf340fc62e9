"""The second plug-in: sounds. Its encoder, its feature extractor, and the reader of its files."""
