"""Whether the masks of labelled datasets have any foreground, and which values their files hold if not."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from vlsm.datasets.examples import ExampleReader, Mask
from vlsm.datasets.records import Record
from vlsm.errors import ConfigError, ImageError

# Nearly all masks of a dataset may be empty, as in most slices of a volume. They are suspicious if most of their files
# hold values above 0 all the same.
_NEARLY_ALL, _MOST = 0.99, 0.5
_SHOWN = 8  # values that a message lists


@dataclass
class ForegroundCount:
    """Counts of the masks of one split of a dataset.

    Attributes:
        num_masks: all masks.
        num_empty: masks without foreground.
        num_dark: empty masks whose files hold values above 0, none of them above data.mask_threshold.
        values: values of the files; collected until there are more than a message lists.
    """

    num_masks: int = 0
    num_empty: int = 0
    num_dark: int = 0
    values: set[int] = field(default_factory=set)

    def add(self, mask: Mask, has_labels: bool) -> None:
        """Count one more mask; has_labels tells whether its record states the values that are foreground."""
        is_empty = not mask.mask.any()
        self.num_masks += 1
        self.num_empty += is_empty
        self.num_dark += is_empty and not has_labels and any(stored.any() for stored in mask.stored)
        if len(self.values) <= _SHOWN:
            self.values.update(*(map(int, np.unique(stored)) for stored in mask.stored))

    @property
    def is_wrong(self) -> bool:
        """Whether the masks cannot be meant: all are empty, or nearly all although most files hold values above 0."""
        if not self.num_masks or self.num_empty < _NEARLY_ALL * self.num_masks:
            return False
        return self.num_empty == self.num_masks or self.num_dark >= _MOST * self.num_masks

    def describe(self, dataset: str, split: str, mask_threshold: int) -> str:
        """Return the counts, the values and the setting that decides, as one sentence."""
        values = sorted(self.values)
        listed = ", ".join(map(str, values[:_SHOWN])) + (", ..." if len(values) > _SHOWN else "")
        sentence = (
            f"dataset {dataset}: {self.num_empty:,} of {self.num_masks:,} masks of split {split} are empty with "
            f"data.mask_threshold={mask_threshold}; the values in their files are {listed or 'unknown'}"
        )
        return sentence + ("; --set data.mask_threshold=0 takes all values above 0" if self.num_dark else "")


def check_foreground(records: Iterable[Record], reader: ExampleReader, mask_threshold: int) -> None:
    """Raise a ConfigError if nearly all masks of a split of a dataset are empty. Unreadable masks are not counted."""
    counts: dict[tuple[str, str], ForegroundCount] = defaultdict(ForegroundCount)
    for record in records:
        try:
            counts[record.dataset, record.split].add(reader.read_mask(record), bool(record.labels))
        except ImageError:
            continue
    for (dataset, split), count in counts.items():
        if count.is_wrong:
            raise ConfigError(count.describe(dataset, split, mask_threshold))
