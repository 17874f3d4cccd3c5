"""From logits to tokens: penalties, the choice itself, and log-probabilities, row by row on the team's threads.

A row's token depends on its own logits, its parameters, its seed and its position; never on other rows.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from minilora_kernels.batch import CHOICE_ROW, NOT_CHOSEN, SAMPLING, choose, unpack
from minilora_kernels.jit import kernel
from minilora_kernels.sample import argmax, log_sum_exp, top
from minilora_kernels.sample import rank as rank_of
from minilora_kernels.sync import claim
from minilora_kernels.team import Team, team_program

from .batch import Draw, pack_draws
from .errors import RequestError
from .model import Buffers
from .params import MOST_LOGPROBS
from .sequence import TokenLogprobs

LOGITS_PER_THREAD = 200_000


class Questions(NamedTuple):
    """Rows whose log-probabilities are wanted: of one token, and of the `best` best."""

    at: np.ndarray
    token: np.ndarray
    best: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@kernel
def _choose(thread, threads, sync, job, room):
    (logits, packed), (width, chances, ids) = job, room
    batch, _, _ = unpack(packed)
    i = claim(sync)
    while i < len(batch.choices):
        best = argmax(logits, batch.choices[i, CHOICE_ROW] * width, width)
        choose(batch, i, 0, best, logits, width, chances, ids, thread * width)
        i = claim(sync)


@kernel
def _look_up(thread, threads, sync, questions, rows):
    logits, width = rows
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


@cache
def _programs():
    return team_program(_choose, units=[SAMPLING]), team_program(_look_up)


class Sampler:
    """Chooses tokens. buffers: the step's, with flat float32 rows of `width` logits; vocabulary: real tokens of each.

    Most tokens are chosen at the end of the step itself. Where parameters change the logits, `draw` changes copies of
    them after the step and chooses from these.
    """

    def __init__(self, team: Team, buffers: Buffers, width: int, vocabulary: int):
        self._team, self._logits = team, buffers.logits
        self._width, self._vocabulary = width, vocabulary
        self._rows, self._room = (buffers.logits, width), (width, buffers.chances, buffers.ids)
        self._changed = np.empty(0, np.float32)

    def logits(self, count: int) -> np.ndarray:
        """The last step's first `count` rows, [count, V]: a view, good until the next step."""
        return self._logits[: count * self._width].reshape(count, self._width)[:, : self._vocabulary]

    def draw(self, draws: list[Draw], chosen: list[int]) -> list[list[int | Exception]]:
        """A token for each, in each round of a step; or why there is none: an error of its logits processor, or logits
        that are not numbers.

        chosen: what the step chose, round after round, for those whose parameters leave the logits as they are. There
        are several rounds only where these are all.
        """
        if any(draw.params.changes_logits for draw in draws):
            return [self._draw_changed(draws, iter(chosen))]
        rounds = [chosen[first : first + len(draws)] for first in range(0, len(chosen), max(1, len(draws)))]
        return [[_checked(token) for token in tokens] for tokens in rounds if NOT_CHOSEN not in tokens] or [[]]

    def _draw_changed(self, draws: list[Draw], chosen: Iterator[int]) -> list[int | Exception]:
        """Draw for those whose parameters change the logits, from copies; the others get what was chosen."""
        which = [i for i, draw in enumerate(draws) if draw.params.changes_logits]
        tokens = [0 if draw.params.changes_logits else _checked(next(chosen)) for draw in draws]
        good: list[int] = []
        if len(self._changed) < len(which) * self._width:
            self._changed = np.empty(len(which) * self._width, np.float32)
        for i in which:
            row = self._changed[len(good) * self._width : (len(good) + 1) * self._width]
            row[:] = self._logits[draws[i].row * self._width : (draws[i].row + 1) * self._width]
            try:
                alter(row[: self._vocabulary], draws[i])
                good.append(i)
            except Exception as error:
                tokens[i] = error
        packed = pack_draws([draws[i]._replace(row=row) for row, i in enumerate(good)])
        if good:
            self._team.run(_programs()[0], (self._changed, packed), self._room, most=self._threads_for(len(good)))
        for i, token in zip(good, packed.chosen, strict=True):
            tokens[i] = _checked(token)
        return tokens

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
        self._team.run(_programs()[1], questions, self._rows, most=self._threads_for(n))
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


def _checked(token: int) -> int | Exception:
    """What a kernel chose, or why it could not."""
    return token if token >= 0 else RequestError("the logits hold no finite number to choose a token by")


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
    if params.logits_processors and len(wrong := np.flatnonzero(~(logits < np.inf))):
        raise RequestError(
            f"after the request's logits processors the logit of token {wrong[0]} is {logits[wrong[0]]}",
            "Leave numbers there, or -inf for tokens that must not come.",
        )
