"""Numbers in sentences."""


def count(number: float, noun: str) -> str:
    """Return a number with its noun in singular or plural: "1 image", "1,200 images", "1.5 CPUs"."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {noun}{'' if number == 1 else 's'}"
