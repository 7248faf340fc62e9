"""Look inside a model: an encoder layer by layer, and the attention of encoder and Thinker."""
