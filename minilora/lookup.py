"""Prompt lookup: drafts of how a text goes on, from what it already holds.

What a model is asked to quote, edit, sum up or continue stands further up: where the last tokens occurred before, those
that followed are likely to follow again. One step checks all drafts (`Engine.propose`), so they cost the time of their
rows. Speculative decoding (arXiv:2211.17192) without a second model; vLLM calls it ngram.
"""

from array import array

# How many of the last tokens must agree, longest first, and how often the next draft token is right then: a first
# estimate, which each text corrects with this weight.
SHARES = {8: 0.9, 4: 0.8, 2: 0.6, 1: 0.3}
NEWEST = 1 / 16


class PromptLookup:
    """The tokens of one text, to be searched, and how good its drafts have been, used or not."""

    def __init__(self) -> None:
        # Four bytes for each token: bytes are searched faster than lists.
        self._bytes = bytearray()
        self._shares = dict(SHARES)
        self._expected: list[int] = []
        self._agreed = 0

    def propose(self, tokens: list[int], most: int, price: float) -> list[int]:
        """Up to `most` tokens that may follow, as long as each is likelier to be right than `price`.

        tokens: the text, which only grows from call to call. price: what a draft's row costs, in tokens that the same
        time would bring without it. Empty where the text's end never occurred before.
        """
        known = len(self._bytes) // 4
        self._learn(tokens[known:])
        self._bytes += array("i", tokens[known:]).tobytes()
        self._expected = []
        for agreed in self._shares:
            if (start := self._after(agreed)) >= 0:
                self._agreed, self._expected = agreed, _continued(tokens, start, most)
                break
        share = likely = self._shares[self._agreed] if self._expected else 0.0
        worth = 0
        while worth < most and likely > price:
            worth, likely = worth + 1, likely * share
        return self._expected[:worth]

    def _learn(self, came: list[int]) -> None:
        """Compare what was expected with what came."""
        for expected, token in zip(self._expected, came, strict=False):
            right = expected == token
            self._shares[self._agreed] += NEWEST * (right - self._shares[self._agreed])
            if not right:
                break

    def _after(self, count: int) -> int:
        """The place after the latest earlier occurrence of the last `count` tokens; -1 if there is none."""
        last, end = self._bytes[-4 * count :], len(self._bytes) - 4
        while (at := self._bytes.rfind(last, 0, max(end, 0))) % 4:
            if at < 0:
                return -1
            end = at + len(last) - 1
        return at // 4 + count


def _continued(tokens: list[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start` on; beyond the text's end, those from `start` on again."""
    period = len(tokens) - start
    return [tokens[start + i % period] for i in range(count)]
