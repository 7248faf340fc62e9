"""What omni learns from: generated scenes, conversations on disk, and the collator that makes batches of either."""
