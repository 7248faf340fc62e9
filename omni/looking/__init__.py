"""What happens inside: an encoder layer by layer, and where encoder and Thinker look."""
