"""Training: recipes (what), objectives (what is learnt), run (transformers.Trainer does it)."""
