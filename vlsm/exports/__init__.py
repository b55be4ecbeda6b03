"""The files that masks of a run are written as for other tools."""
