"""Labelled datasets: what a folder or list holds, as records, and the image and mask of each record."""
