"""A folder becomes something to use: a fused model with its processor, or an encoder with its preprocessor."""
