"""File formats that hold one image or many: what is in them, and their pixels."""
