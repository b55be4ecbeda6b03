"""The distribution of a metric over any number of rows, in constant memory."""

from dataclasses import dataclass, field

import numpy as np

_FINE = 4000  # bins of a distribution; a median is exact to 0.00025


@dataclass
class Distribution:
    """The distribution of values in [0, 1]. Its mean is exact; its median comes from 4,000 bins."""

    fine: np.ndarray = field(default_factory=lambda: np.zeros(_FINE, np.int64))
    total: float = 0.0
    highest: float = 0.0

    def add(self, values: np.ndarray) -> None:
        """Add values."""
        indices = np.clip((values * _FINE).astype(np.int64), 0, _FINE - 1)
        self.fine += np.bincount(indices, minlength=_FINE)
        self.total += float(values.sum())
        self.highest = max(self.highest, float(values.max(initial=0.0)))

    @property
    def count(self) -> int:
        """The number of values."""
        return int(self.fine.sum())

    @property
    def mean(self) -> float:
        """The mean of all values. It needs at least one value."""
        return self.total / self.count

    @property
    def median(self) -> float:
        """The median of all values. It needs at least one value."""
        middle = [(self.count + 1) // 2, self.count // 2 + 1]  # equal if the count is odd
        return float(np.mean(np.searchsorted(self.fine.cumsum(), middle)) + 0.5) / _FINE

    def bins(self, limit: float, number: int) -> np.ndarray:
        """Return the number of values in each of `number` equal parts of [0, limit]."""
        return self.fine[: round(_FINE * limit)].reshape(number, -1).sum(axis=1)
