"""Data sets of every kind as examples, and examples as training batches."""
