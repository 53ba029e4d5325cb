"""Spikes of the loss: a loss far above those before it, by a rule that the spikes themselves do not spoil."""

import statistics
from collections import deque
from collections.abc import Iterable

WINDOW = 50
"""Losses that a new one is compared with."""
FEWEST = 10
"""With fewer there is no judgement."""
SIGMAS = 6.0
"""Distance from the median that makes a spike, in standard deviations; the losses of steps scatter much less."""
_SIGMA_PER_MAD = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""


class SpikeDetector:
    """Compares each loss with the median of the last ones; a loss that is not finite counts as none.

    Args:
        losses: Those of a run before it was interrupted, the oldest first.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW)

    def excess(self, loss: float) -> float:
        """Return by how much a loss exceeds the median if that is a spike, else 0; remember the loss."""
        known, spike = list(self._losses), 0.0
        if loss == loss and abs(loss) != float("inf"):
            self._losses.append(loss)
        if len(known) >= FEWEST:
            median = statistics.median(known)
            sigma = _SIGMA_PER_MAD * statistics.median(abs(each - median) for each in known)
            if loss - median > max(SIGMAS * sigma, 0.02 * abs(median)):
                spike = loss - median
        return spike
