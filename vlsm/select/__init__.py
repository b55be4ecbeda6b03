"""Which images of a segment run a person should label next, as a list."""
