"""Word error rates and caption scores, and whether the model listens: normalisation, counting, prediction of data sets,
baselines."""
