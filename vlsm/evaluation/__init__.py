"""Scores of predicted masks against labels: image matching, prompts, scores per mask, and tables."""
