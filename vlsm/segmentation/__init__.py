"""From pixels to masks: the models on a device, and the output rows of an image."""
