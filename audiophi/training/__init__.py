"""Training: recipes, stages, the Trainer, the cache of frozen encoder outputs, the printed plan and the curves."""
