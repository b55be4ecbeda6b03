"""Pixels to masks: the models on a device, and what an output row says of a mask."""
