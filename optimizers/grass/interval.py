"""A refresh interval that grows while the subspaces stand still."""

from typing import Any

WINDOW = 5


class AdaptiveInterval:
    """Doubles the interval at every refresh at which the mean similarity of the last ``WINDOW`` reaches a threshold.

    Source: Zhang, Jaiswal, Yin, Liu, Zhao, Tian, Wang (2024), "Q-GaLore", arXiv 2407.08296, Section 3.2. It goes by the
    cosine similarity of each layer's successive projections, layer by layer; here one interval serves all layers, so
    that moments and step counts are reset together, and the similarity is their mean.

    Attributes:
        interval: in optimizer steps.
        next_refresh: the number of the step after which the subspace changes.
    """

    def __init__(self, interval: int, *, threshold: float, longest: int) -> None:
        self.interval = interval
        self.next_refresh = interval
        self._threshold, self._longest = threshold, longest
        self._recent: list[float] = []

    def observe(self, similarity: float) -> int:
        """Take note of a refresh.

        Args:
            similarity: of the old and the new subspaces: 1 if they are the same, 0 if they are as close as chance has
                it.

        Returns:
            The interval to the next one, which :attr:`next_refresh` has been moved by.
        """
        self._recent = [*self._recent[1 - WINDOW :], similarity]
        if len(self._recent) == WINDOW and sum(self._recent) / WINDOW >= self._threshold:
            self.interval = max(self.interval, min(2 * self.interval, self._longest))
        self.next_refresh += self.interval
        return self.interval

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"interval": self.interval, "next_refresh": self.next_refresh, "recent": list(self._recent)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.interval, self.next_refresh = state["interval"], state["next_refresh"]
        self._recent = list(state["recent"])
