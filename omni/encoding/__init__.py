"""Pictures to vectors, many and fast: encoders alone, without a question."""
