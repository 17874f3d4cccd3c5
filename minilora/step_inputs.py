"""What a step is asked for: the tokens of its texts that it computes, and what its rows of logits are for."""

from collections.abc import Callable, Iterable, Set
from typing import NamedTuple

from .batch import Chunk, Draw, Use
from .scheduler import Work
from .sequence import AdapterUse, Sequence, State


class Answer(NamedTuple):
    """A row of logits from which a sequence's next token comes, if its draft tokens up to here are right."""

    sequence: Sequence
    row: int
    draft_tokens: list[int]


class Question(NamedTuple):
    """A row of logits, asked for the log-probability of the prompt's token at `place`."""

    sequence: Sequence
    row: int
    place: int


def chunk_of(work: Work, number: Callable[[AdapterUse], int]) -> Chunk:
    """The part of a text that the step computes. number: of an adapter, as the step knows it."""
    sequence, length = work
    start = sequence.computed
    end = start + length
    uses = tuple([Use(number(use), use.scale) for use in sequence.uses])
    first = end - 1 - sequence.drafted if end == len(sequence.tokens) else end
    if sequence.wants_prompt_logprobs:
        first = start
    return Chunk(sequence.tokens, start, length, sequence.pages, uses, first)


def expected(plan: Iterable[Work]) -> tuple[list[Answer], list[Question]]:
    """What the step's rows of logits will be for."""
    row = 0
    answers: list[Answer] = []
    questions: list[Question] = []
    for sequence, length in plan:
        start = sequence.computed
        done = start + length == len(sequence.tokens)
        if sequence.wants_prompt_logprobs:
            end = min(start + length, sequence.prompt_length - 1)
            # If it was preempted, some are known already.
            new = range(max(start, len(sequence.prompt_logprobs)), end)
            questions += [Question(sequence, row + place - start, place + 1) for place in new]
            row += length - done
        if done:
            drafts = sequence.draft_tokens
            answers.append(Answer(sequence, row, drafts))
            answers += [Answer(s, row, []) for s in sequence.siblings if s.state is not State.FINISHED]
            row += 1 + len(drafts)
    return answers, questions


def draws_of(answer: Answer, eos: Set[int]) -> list[Draw]:
    """What the draw of the next token depends on, and those after each draft token."""
    return [_draw(answer, i, eos) for i in range(1 + len(answer.draft_tokens))]


def _draw(answer: Answer, i: int, eos: Set[int]) -> Draw:
    """What the draw after the first i draft tokens depends on."""
    sequence = answer.sequence
    cut, params, drafts = sequence.prompt_length, sequence.params, answer.draft_tokens[:i]
    end = len(sequence.tokens) - sequence.drafted
    barred = (*eos, *(params.stop_token_ids or ())) if params.min_tokens else ()
    if not params.changes_logits:
        return Draw(answer.row + i, params, sequence.seed, end + i, [], [], barred)
    text = sequence.tokens[cut:end] + drafts
    return Draw(answer.row + i, params, sequence.seed, end + i, sequence.tokens[:cut], text, barred)


def ends_of(plan: Iterable[Work], eos: Set[int]) -> set[int]:
    """Tokens that end texts."""
    ends: set[int] = set()
    for sequence, _ in plan:
        ends.update(sequence.params.stop_token_ids or (), () if sequence.params.ignore_eos else eos)
    return ends
