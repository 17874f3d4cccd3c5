"""What a step computed, kept: new tokens, log-probabilities, copies of finished prompts, and texts that end."""

from collections.abc import Set
from typing import NamedTuple

from .batch import Draw
from .bounds import Bounds
from .cache import PagePool
from .registry import AdapterRegistry
from .runner import Runner
from .scheduler import Scheduler, Work
from .sequence import Sequence, State, TokenLogprobs
from .stats import Recorder
from .step_inputs import Answer, Question


class Output(NamedTuple):
    """A new token of a sequence, with logprobs where its parameters ask for them; or None: it ended without one.

    last: the sequence ended with this token.
    """

    sequence: Sequence
    token: int | None
    logprobs: TokenLogprobs | None = None
    last: bool = False


class StepResults:
    """Brings the books of an engine up to date after its steps. eos: tokens that end a text."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        pool: PagePool,
        adapters: AdapterRegistry,
        recorder: Recorder,
        bounds: Bounds,
        eos: Set[int],
    ):
        self._runner, self._scheduler, self._pool, self._adapters = runner, scheduler, pool, adapters
        self._recorder, self._bounds, self._eos = recorder, bounds, eos

    def keep(
        self,
        plan: list[Work],
        answers: list[Answer],
        questions: list[Question],
        draws: list[Draw],
        tokens: list[list[int | Exception]],
    ) -> list[Output]:
        """The new tokens, once they are in their texts.

        plan: what the step was; answers, questions: what its rows of logits were for; tokens: of each round, one for
        each of the draws, or why there is none.
        """
        # All that can fail comes before the first token is kept: each token kept is also reported.
        logprobs = self._logprobs(draws, tokens[0])
        self._note_computed(plan, questions)
        return self._answer(answers, tokens, logprobs)

    def _logprobs(self, draws: list[Draw], tokens: list[int | Exception]) -> list[TokenLogprobs | None]:
        """For each draw whose text asks for them."""
        if all(draw.params.logprobs is None for draw in draws):
            return [None] * len(draws)
        wanted = [
            None if d.params.logprobs is None or isinstance(token, Exception) else (d.row, token, d.params.logprobs)
            for d, token in zip(draws, tokens, strict=True)
        ]
        found = iter(self._runner.sampler.look_up([question for question in wanted if question is not None]))
        return [None if question is None else next(found) for question in wanted]

    def _note_computed(self, plan: list[Work], questions: list[Question]) -> None:
        """Note what was computed, log-probabilities of prompts too, and start copies."""
        for sequence, length in plan:
            done = sequence.computed + length == len(sequence.tokens)
            self._scheduler.computed(sequence, length - len(sequence.drop_drafts()))
            if done and sequence.siblings:
                self._start_copies(sequence)
        wanted = [(row, asker.tokens[place], asker.params.prompt_logprobs or 0) for asker, row, place in questions]
        for question, found in zip(questions, self._runner.sampler.look_up(wanted), strict=True):
            question.sequence.prompt_logprobs.append(found)

    def _start_copies(self, sequence: Sequence) -> None:
        """Siblings share the full pages of a finished prompt and copy the last one."""
        full = sequence.computed // self._scheduler.page
        rest = sequence.pages[full:]
        for sibling in sequence.siblings:
            if sibling.state is State.FINISHED:
                continue
            if self._pool.available >= len(rest) and self._adapters.acquire(sibling.adapters):
                sibling.holds_adapters = True
                copies = [self._pool.take() for _ in rest]
                for source, target in zip(rest, copies, strict=True):
                    self._runner.copy_page(source, target)
                for page in sequence.pages[:full]:
                    self._pool.share(page)
                sibling.pages, sibling.computed = sequence.pages[:full] + copies, sequence.computed
            # Copies began with the prompt that they share, and share what it found in the cache.
            sibling.times.started, sibling.cached = sequence.times.started, sequence.cached
            sibling.prompt_logprobs = sequence.prompt_logprobs
            self._scheduler.start_copy(sibling)
        sequence.siblings = []

    def _answer(
        self, answers: list[Answer], tokens: list[list[int | Exception]], logprobs: list[TokenLogprobs | None]
    ) -> list[Output]:
        """Keep what was drawn, round after round. tokens: of each round, one for each draw; logprobs: of the first."""
        outputs: list[Output] = []
        first, (once, *again) = 0, tokens
        for answer in answers:
            end = first + 1 + len(answer.draft_tokens)
            drawn = [*once[first:end], *(later[first] for later in again)]
            self._keep(answer, drawn, [*logprobs[first:end], *(None for _ in again)], outputs)
            first = end
        return outputs

    def _keep(
        self, answer: Answer, tokens: list[int | Exception], logprobs: list[TokenLogprobs | None], outputs: list[Output]
    ) -> None:
        """Append the drawn tokens that count, up to the text's end or the first wrong draft, to text and outputs."""
        sequence = answer.sequence
        for i, token in enumerate(tokens):
            if isinstance(token, Exception):
                self._scheduler.unpublish(sequence)
                self._scheduler.fail(sequence, token)
                break
            self._append(sequence, token)
            last = sequence.state is State.FINISHED
            outputs.append(Output(sequence, token, logprobs[i], last))
            if last or i + 1 == len(tokens) or (answer.draft_tokens and token != answer.draft_tokens[i]):
                break
            # The step went on with this token, so it is computed already.
            self._scheduler.computed(sequence, 1)
        if answer.draft_tokens:
            self._recorder.drafted(len(answer.draft_tokens), i)
            if sequence.state is State.RUNNING:
                self._scheduler.roll_back(sequence)

    def _append(self, sequence: Sequence, token: int) -> None:
        most = self._bounds.final_length(sequence.prompt_length, sequence.params)
        reason = sequence.append(token, self._eos, most)
        self._scheduler.generated(sequence)
        if reason is not None:
            self._scheduler.finish(sequence, reason)
