"""Predictions of a model for a data set (`loop.py`, `conditions.py`) and their scores: transcripts.py, captions.py,
answers.py, by the metrics beside them."""
