"""The little world that the shipped weights know: drawn scenes, questions about them and their answers."""
