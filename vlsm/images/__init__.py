"""One image, from the bytes of a file to the square that a model takes."""
