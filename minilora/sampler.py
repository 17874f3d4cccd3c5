"""From logits to tokens: penalties, the choice itself, and log-probabilities, row by row on the team's threads.

A row's token depends on its own logits, its parameters, its seed and its position; never on other rows.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np

from minilora_kernels.jit import program
from minilora_kernels.sample import argmax, log_sum_exp, sample, top, uniform
from minilora_kernels.sample import rank as rank_of
from minilora_kernels.team import Team, claim, enter, leave

from .errors import RequestError
from .params import MOST_LOGPROBS, SamplingParams
from .sequence import TokenLogprobs

ZERO = np.float32(0)
LOGITS_PER_THREAD = 200_000


class Choices(NamedTuple):
    """Rows to choose tokens for. numbers: int64 [n, 4], where each row's logits start, top_k, and the key of the random
    number: seed and position; cuts: float32 [n, 3], temperature, top_p and min_p; tokens: the answers."""

    numbers: np.ndarray
    cuts: np.ndarray
    tokens: np.ndarray


class Questions(NamedTuple):
    """Rows whose log-probabilities are wanted: of one token, and of the `best` best."""

    at: np.ndarray
    token: np.ndarray
    best: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    ids: np.ndarray
    values: np.ndarray


def _choose(rank, size, sync, logits, width, rows, weights, ids):
    enter(sync, rank, size)
    i = claim(sync)
    while i < len(rows.tokens):
        at, top_k = rows.numbers[i, 0], rows.numbers[i, 1]
        temperature, top_p, min_p = rows.cuts[i, 0], rows.cuts[i, 1], rows.cuts[i, 2]
        if temperature == ZERO:
            rows.tokens[i] = argmax(logits, at, width)
        else:
            draw = uniform(np.uint64(rows.numbers[i, 2]), rows.numbers[i, 3])
            to = rank * width
            rows.tokens[i] = sample(logits, at, width, temperature, top_k, top_p, min_p, draw, weights, ids, to)
        i = claim(sync)
    leave(sync, rank, size)


def _look_up(rank, size, sync, logits, width, questions):
    enter(sync, rank, size)
    i = claim(sync)
    while i < len(questions.at):
        at, token = questions.at[i], questions.token[i]
        total = log_sum_exp(logits, at, width)
        questions.logprob[i] = logits[at + token] - total
        questions.rank[i] = rank_of(logits, at, width, token)
        to = i * MOST_LOGPROBS
        if questions.best[i] > 0:
            top(logits, at, width, questions.best[i], questions.ids, questions.values, to)
            for j in range(to, to + questions.best[i]):
                questions.values[j] -= total
        i = claim(sync)
    leave(sync, rank, size)


@cache
def _programs():
    return program(_choose), program(_look_up)


class Draw(NamedTuple):
    """A token to draw: from row `row` of the logits, for a text with these parameters."""

    row: int
    params: SamplingParams
    seed: int
    position: int
    prompt: list[int]
    text: list[int]
    barred: tuple[int, ...]


class Sampler:
    """Chooses tokens. logits: the step's flat float32 rows of `width`; best: where each row's largest is; vocabulary:
    real tokens of each."""

    def __init__(self, team: Team, logits: np.ndarray, best: np.ndarray, width: int, vocabulary: int):
        self._team, self._logits, self._best = team, logits, best
        self._width, self._vocabulary = width, vocabulary
        self._weights = np.empty(team.size * width, np.float32)
        self._ids = np.empty(team.size * width, np.int64)
        self._changed = np.empty(0, np.float32)

    def logits(self, count: int) -> np.ndarray:
        """The last step's first `count` rows, [count, V]: a view, good until the next step."""
        return self._logits[: count * self._width].reshape(count, self._width)[:, : self._vocabulary]

    def draw(self, draws: list[Draw]) -> list[int | Exception]:
        """A token for each, or why there is none: an error of its logits processor, or logits that are no numbers."""
        tokens: list[int | Exception] = [0] * len(draws)
        plain = []
        for i, draw in enumerate(draws):
            if draw.params.greedy and not draw.params.changes_logits:
                # The step has found these already.
                tokens[i] = self._checked(int(self._best[draw.row]), self._logits, draw.row)
            elif not draw.params.changes_logits:
                plain.append(i)
        self._draw_rows(tokens, plain, self._logits, draws, [draws[i].row for i in plain])
        if any(draw.params.changes_logits for draw in draws):
            self._draw_altered(tokens, draws)
        return tokens

    def _draw_altered(self, tokens: list[int | Exception], draws: list[Draw]) -> None:
        """Draw for those whose parameters change the logits, from copies."""
        altered = [i for i, draw in enumerate(draws) if draw.params.changes_logits]
        good: list[int] = []
        if len(self._changed) < len(altered) * self._width:
            self._changed = np.empty(len(altered) * self._width, np.float32)
        for i in altered:
            row = self._changed[len(good) * self._width : (len(good) + 1) * self._width]
            row[:] = self._logits[draws[i].row * self._width : (draws[i].row + 1) * self._width]
            try:
                alter(row[: self._vocabulary], draws[i])
                good.append(i)
            except Exception as error:
                tokens[i] = error
        self._draw_rows(tokens, good, self._changed, draws, list(range(len(good))))

    def _draw_rows(
        self, tokens: list[int | Exception], which: list[int], logits: np.ndarray, draws: list[Draw], rows: list[int]
    ) -> None:
        """tokens[i] for each i of which, from its row of logits."""
        found: Iterable[int] = self._choose(logits, [draws[i] for i in which], rows) if which else ()
        for i, row, token in zip(which, rows, found, strict=True):
            tokens[i] = self._checked(int(token), logits, row)

    def _checked(self, token: int, logits: np.ndarray, row: int) -> int | Exception:
        """The token, if its logit is a number."""
        if math.isfinite(logits[row * self._width + token]):
            return token
        return RequestError("the logits hold no finite number to choose a token by")

    def _choose(self, logits: np.ndarray, draws: list[Draw], rows: list[int]) -> np.ndarray:
        width, half, whole = self._width, 1 << 63, 1 << 64
        keys = [(d.seed + half) % whole - half for d in draws]
        numbers = [
            (row * width, d.params.top_k, key, d.position) for row, key, d in zip(rows, keys, draws, strict=True)
        ]
        cuts = [(0 if d.params.greedy else d.params.temperature, d.params.top_p, d.params.min_p) for d in draws]
        choices = Choices(np.array(numbers, np.int64), np.array(cuts, np.float32), np.zeros(len(draws), np.int64))
        program, most = _programs()[0], self._threads_for(len(draws))
        self._team.run(program, logits, width, choices, self._weights, self._ids, most=most)
        return choices.tokens

    def _threads_for(self, rows: int) -> int:
        """Threads that so many rows are worth: another one takes as long to call in as LOGITS_PER_THREAD to look at."""
        return 1 + rows * self._width // LOGITS_PER_THREAD

    def look_up(self, wanted: list[tuple[int, int, int]]) -> list[TokenLogprobs]:
        """log-probabilities for (row, token, count of best tokens), from the logits as the model gave them."""
        if not wanted:
            return []
        rows, tokens, counts = (np.array(column, np.int64) for column in zip(*wanted, strict=True))
        n = len(wanted)
        questions = Questions(
            rows * self._width,
            tokens,
            np.minimum(counts, self._vocabulary),
            np.zeros(n, np.float32),
            np.zeros(n, np.int64),
            np.zeros(n * MOST_LOGPROBS, np.int64),
            np.zeros(n * MOST_LOGPROBS, np.float32),
        )
        self._team.run(_programs()[1], self._logits, self._width, questions, most=self._threads_for(n))
        return [
            TokenLogprobs(
                int(token),
                float(questions.logprob[i]),
                int(questions.rank[i]),
                [
                    (int(questions.ids[j]), float(questions.values[j]))
                    for j in range(i * MOST_LOGPROBS, i * MOST_LOGPROBS + int(questions.best[i]))
                ],
            )
            for i, token in enumerate(tokens)
        ]


def alter(logits: np.ndarray, draw: Draw) -> None:
    """Barred tokens, penalties, biases and the request's own processors, in place, in vLLM's order.

    Repetition: logits of tokens in prompt or text are divided by the penalty if positive, multiplied if not.
    """
    params = draw.params
    if draw.barred and len(draw.text) < params.min_tokens:
        logits[list(draw.barred)] = -np.inf
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.array(draw.prompt + draw.text, np.int64))
        factor = np.float32(params.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    if draw.text and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(np.array(draw.text, np.int64), return_counts=True)
        logits[ids] -= (params.frequency_penalty * counts + params.presence_penalty).astype(np.float32)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += np.float32(bias)
    for processor in params.logits_processors or ():
        found = processor(draw.prompt, draw.text, logits)
        if found is not None and found is not logits:
            logits[:] = found
