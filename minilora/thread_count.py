"""How many threads of the team take part, learned from the steps themselves.

Threads that meet at barriers wait for the slowest. When other programs want the cores too, a thread that was put aside
for some milliseconds stops all of them: fewer threads that all run are faster. Results do not depend on their number.
"""

# Seconds of steps that one judgement rests on; how many cores lost to others are too many; and how long a smaller
# number works before a larger one is tried: twice as long after each attempt that failed.
WINDOW = 0.02
TOO_MUCH = 0.25
FIRST_WAIT, LONGEST_WAIT = 0.1, 1.6


class ThreadCount:
    """size: threads to use, from 1 to `most`."""

    def __init__(self, most: int):
        self.most = self.size = most
        self._seconds = self._lost = 0.0
        self._worked, self._wait, self._tries = 0.0, FIRST_WAIT, False

    def observe(self, seconds: float, lost: float) -> None:
        """Note a step's duration, and the seconds that its threads together could not run meanwhile."""
        self._seconds += seconds
        self._lost += lost
        if self._seconds >= WINDOW:
            self._judge(self._lost / self._seconds)
            self._seconds = self._lost = 0.0

    def _judge(self, lost: float) -> None:
        """lost: cores that others had."""
        self._worked += self._seconds
        if lost > TOO_MUCH and self.size > 1:
            self._wait = min(2 * self._wait, LONGEST_WAIT) if self._tries else FIRST_WAIT
            self._resize(self.size - max(1, round(lost)), tries=False)
        elif self.size < self.most and self._worked >= self._wait:
            self._resize(self.size + 1, tries=True)
        else:
            self._tries = False

    def _resize(self, size: int, tries: bool) -> None:
        self.size, self._worked, self._tries = max(1, size), 0.0, tries
