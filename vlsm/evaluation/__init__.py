"""Masks against labels: which images and prompts, one mask against one target, and what the scores say together."""
