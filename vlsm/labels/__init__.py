"""Masks that people have corrected in annotation tools, as a labelled dataset."""
