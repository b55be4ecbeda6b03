"""Training from labelled datasets to a checkpoint: datasets, order of the examples, learner, and the run's folder."""
