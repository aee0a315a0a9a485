"""An executor on Ray that notes when each part was finished."""

import time

from vaemo.cluster.executor import OnRay


class Timed(OnRay):
    """Attributes: `ends`, for each part when it was finished, and how many units it held."""

    def __init__(self):
        self.ends = []

    def run(self, parts):
        for made in super().run(parts):
            self.ends.append((time.perf_counter(), made["units"]))
            yield made

    def rate(self):
        """Units a second over the quickest half of the parts: other work on the machine only ever slows."""
        half = len(self.ends) // 2
        return max(
            sum(n for _, n in self.ends[first + 1 : first + half + 1])
            / (self.ends[first + half][0] - self.ends[first][0])
            for first in range(len(self.ends) - half)
        )
