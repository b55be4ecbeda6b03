"""Labelled data to a checkpoint: datasets, the order of examples, a model that learns, and its folder."""
