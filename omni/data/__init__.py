"""Training data: conversations on disk, their check, and the collator that makes batches of them."""
