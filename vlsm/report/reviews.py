"""The gallery of a report as a place for a review: how many masks it shows, how large, and of which run."""

import re
from dataclasses import dataclass
from typing import Any

from vlsm.errors import ConfigError
from vlsm.report.pictures import MAX_CARDS, CardSize
from vlsm.runs.marks import RUN_ID

MAX_REVIEW_CARDS, SIDES_PX, MAX_PAGE_MB = 5_000, (100, 1_600), 250
SIDE_PX = 400
_BYTES = 16_000  # of a picture with SIDE_PX pixels, as WebP
_IN_BASE64, _BESIDE = 4 / 3, 5_000  # bytes of a card without its picture: outline, words, numbers


@dataclass(frozen=True)
class Gallery:
    """How much the gallery of a segment run's report shows.

    Attributes:
        cards: the most masks in it.
        side_px: longer side of their pictures in pixels.

    Raises:
        ConfigError: a value is out of bounds, or the page could become too large for a browser.
    """

    cards: int = MAX_CARDS
    side_px: int = SIDE_PX

    def __post_init__(self) -> None:
        if not 1 <= self.cards <= MAX_REVIEW_CARDS:
            raise ConfigError(f"--gallery is {self.cards}; it must be a number of masks from 1 to {MAX_REVIEW_CARDS:,}")
        if not SIDES_PX[0] <= self.side_px <= SIDES_PX[1]:
            raise ConfigError(
                f"--gallery-px is {self.side_px}; it must be from {SIDES_PX[0]} to {SIDES_PX[1]:,} pixels"
            )
        if self.most_mb > MAX_PAGE_MB:
            raise ConfigError(
                f"a gallery of {self.cards:,} masks with {self.side_px:,} pixels may take {self.most_mb:,.0f} MB, and "
                f"{MAX_PAGE_MB} MB are the most; lower --gallery or --gallery-px"
            )

    @property
    def most_mb(self) -> float:
        """The largest size of the gallery in the page, in megabytes."""
        return self.cards * (self._picture_bytes * _IN_BASE64 + _BESIDE) / 1e6

    @property
    def _picture_bytes(self) -> int:
        return round(_BYTES * (self.side_px / SIDE_PX) ** 2)

    def card_size(self, is_review: bool) -> CardSize:
        """Return the size of the cards; without a review they are small, unless more is asked for."""
        if is_review or self.side_px != SIDE_PX:
            return CardSize(self.side_px, self._picture_bytes, has_layer=is_review)
        return CardSize()


def review_id(record: dict[str, Any]) -> str:
    """Return the id of the run as its record has it, by which marks are kept; "" if it has none."""
    run_id = record.get("run_id")
    return run_id if isinstance(run_id, str) and re.fullmatch(RUN_ID, run_id) else ""
