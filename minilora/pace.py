"""How long steps take on this machine, learned from the steps themselves: so a prompt delays others only so much, and
tokens are drafted only where that pays."""

# Weight of the newest step in the running averages, and the fewest prompt rows that are worth a step's overhead.
NEWEST = 0.1
SMALLEST = 16
# What a draft token costs, in tokens, before that is known, and by what factor it must pay; how fast the cost is
# forgotten while there are none, so that one slow step does not end them for good.
FIRST_PRICE, MARGIN = 0.5, 1.2
FORGOTTEN = 1 / 2048
# Seconds that nobody notices: texts may grow in bursts of that length.
BURST = 0.02


class Pace:
    """Running averages of step times. limit: seconds that a step may take in which texts decode; None for any.

    most_rows: of a step; most_rounds: tokens that one may give each text.
    """

    def __init__(self, limit: float | None, most_rows: int, most_rounds: int):
        self.limit, self.most_rows, self.most_rounds = limit, most_rows, most_rounds
        self.decode_step = self.prompt_row = self.newest_decode = 0.0
        self._draft: float | None = None

    def observe(self, decodes: int, prompt_rows: int, seconds: float, drafted: int = 0) -> None:
        """Note a step's rows of each kind and its duration, or that of one of its rounds."""
        if prompt_rows:
            rest = seconds - (self.decode_step if decodes else 0.0)
            self.prompt_row = _average(self.prompt_row, max(rest, 0.0) / prompt_rows)
        elif drafted:
            # No row takes longer than a step by itself: what did was waiting for something else.
            more = min((seconds - self.newest_decode) / drafted, self.newest_decode)
            self._draft = more if self._draft is None else self._draft + (more - self._draft) / 4
        else:
            self.newest_decode = seconds
            self.decode_step = _average(self.decode_step, seconds)
            self._draft = None if self._draft is None else self._draft * (1 - FORGOTTEN)

    def draft_price(self, texts: int) -> float:
        """What a draft token costs while so many texts decode: the tokens that they get in the time its row takes."""
        if self._draft is None or not self.newest_decode:
            return FIRST_PRICE
        return MARGIN * max(self._draft, 0.0) / self.newest_decode * texts

    def chunk(self) -> int:
        """Prompt rows that a step may have beside decodes; never none, so that prompts go on."""
        if self.limit is None or not self.prompt_row:
            return self.most_rows
        rows = (self.limit - self.decode_step) / self.prompt_row
        return int(min(max(rows, SMALLEST), self.most_rows))

    def rounds(self) -> int:
        """Tokens that a step may give each text without making new ones wait long, or visible bursts."""
        if not self.newest_decode:
            return 1
        # No average: the next step is most like the last one, and the first of all is far too slow.
        seconds = BURST if self.limit is None else min(BURST, self.limit)
        return int(min(max(seconds / self.newest_decode, 1), self.most_rounds))


def _average(before: float, value: float) -> float:
    return before + NEWEST * (value - before) if before else value
