"""The free parts of a stretch of disk or memory."""

from bisect import insort


class FreeRanges:
    """Offsets and lengths, in order; neighbours are one. First fit. Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.ranges: list[tuple[int, int]] = [(0, capacity)] if capacity else []

    def take(self, nbytes: int) -> int | None:
        """The offset of a range that is the caller's from now on; None if no free one is that large."""
        for place, (offset, length) in enumerate(self.ranges):
            if length >= nbytes:
                if length == nbytes:
                    del self.ranges[place]
                else:
                    self.ranges[place] = (offset + nbytes, length - nbytes)
                return offset
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Make a range free again that was taken."""
        insort(self.ranges, (offset, nbytes))
        place = self.ranges.index((offset, nbytes))
        if place + 1 < len(self.ranges) and offset + nbytes == self.ranges[place + 1][0]:
            nbytes += self.ranges.pop(place + 1)[1]
            self.ranges[place] = (offset, nbytes)
        if place and sum(self.ranges[place - 1]) == offset:
            before, before_length = self.ranges[place - 1]
            self.ranges[place - 1 : place + 1] = [(before, before_length + nbytes)]

    @property
    def nbytes(self) -> int:
        """In all."""
        return sum(length for _, length in self.ranges)
