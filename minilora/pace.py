"""How long steps take on this machine, learned from the steps themselves; so a prompt delays others only so much."""

# Weight of the newest step in the running averages, and the fewest prompt rows that are worth a step's overhead.
NEWEST = 0.1
SMALLEST = 16
# Seconds that nobody notices: texts may grow in bursts of that length.
BURST = 0.02


class Pace:
    """Running averages of step times. limit: seconds that a step may take in which texts decode; None for any.

    most_rows: of a step; most_rounds: tokens that one may give each text.
    """

    def __init__(self, limit: float | None, most_rows: int, most_rounds: int):
        self.limit, self.most_rows, self.most_rounds = limit, most_rows, most_rounds
        self.decode_step = self.prompt_row = self.newest_decode = 0.0

    def observe(self, decodes: int, prompt_rows: int, seconds: float) -> None:
        """Note a step's rows of each kind and its duration, or that of one of its rounds."""
        if not prompt_rows:
            self.newest_decode = seconds
            self.decode_step = _average(self.decode_step, seconds)
        else:
            rest = seconds - (self.decode_step if decodes else 0.0)
            self.prompt_row = _average(self.prompt_row, max(rest, 0.0) / prompt_rows)

    def chunk(self) -> int:
        """Prompt rows that a step may have beside decodes; never none, so that prompts go on."""
        if self.limit is None or not self.prompt_row:
            return self.most_rows
        rows = (self.limit - self.decode_step) / self.prompt_row
        return int(min(max(rows, SMALLEST), self.most_rows))

    def rounds(self) -> int:
        """Tokens that a step may give each text without new ones waiting for long, or bursts being seen."""
        if not self.newest_decode:
            return 1
        # No average: the next step is most like the last one, and the first of all is far too slow.
        seconds = BURST if self.limit is None else min(BURST, self.limit)
        return int(min(max(seconds / self.newest_decode, 1), self.most_rounds))


def _average(before: float, value: float) -> float:
    return before + NEWEST * (value - before) if before else value
