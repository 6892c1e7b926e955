"""Word error rates and whether the model listens: normalisation, counting, transcription of data sets, baselines."""
