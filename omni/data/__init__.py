"""What omni learns from: conversations on disk, their check, and the collator that makes batches of examples."""
