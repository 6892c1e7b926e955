"""What a model says about itself when it is published: the model card, its licences, its results."""
