"""A classifier: an encoder of any modality, and a linear head with a score for each class."""
