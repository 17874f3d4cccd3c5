"""The engine: schedule, run, keep the results. Token ids only.

Everything is called from one thread. A request that fails ends alone; a step that fails ends the requests that were
in it, and the engine goes on.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

from .adapters import Adapter, pack_adapter
from .bounds import Bounds
from .cache import PagePool
from .errors import EngineClosedError, RequestError, UnloadedError, UsageError
from .interrupts import Interrupts
from .pace import Pace
from .params import EngineConfig, SamplingParams, check_order
from .peft import load_adapter, tiny_adapter
from .registry import AdapterRegistry, AdapterVersion
from .runner import PROMPT_LOGITS, Runner
from .scheduler import Scheduler, Work
from .sequence import AdapterUse, Sequence, State
from .stats import AdapterStats, Recorder, Stats, adapter_states, load_by_adapter
from .step_guard import StepGuard
from .step_inputs import chunk_of, draws_of, ends_of, expected
from .step_results import Output, StepResults
from .weights import Weights

# Steps in a row that may find no work while requests wait and nothing is being read; more are a bug, and raise.
PATIENCE = 10


class Engine:
    """Runs any number of texts through one model, with any adapters, step by step.

    eos: tokens that end a text. Raises UsageError where max_model_len is more than the model's positions reach,
    ResourceError where the memory does not suffice.
    """

    def __init__(self, weights: Weights, config: EngineConfig | None = None, eos: Iterable[int] = ()):
        self.weights, self.model = weights, weights.config
        self.config = config = config or EngineConfig()
        self.eos = frozenset(eos)
        self.length = config.max_model_len or self.model.max_position_embeddings
        if self.length > self.model.rope.reach:
            raise UsageError(
                f"max_model_len is {self.length}, but the model's positions reach {self.model.rope.reach}",
                "It was trained for no more: lower max_model_len, or leave it out.",
                param="max_model_len",
            )
        self.runner = Runner(weights, config, self.length)
        self.bounds = Bounds(self.length, self.model.vocab_size, self.runner.pages, config)
        self.pool = PagePool(self.runner.pages, self.runner.poison_page if config.debug_checks else None)
        # An entry for each adapter that was read. Its methods are single calls of C: Ctrl-C leaves no lock taken, as it
        # may within an Event.
        self._news: SimpleQueue[None] = SimpleQueue()
        model, fmt = self.model, self.runner.adapter_pool.format
        self.adapters = AdapterRegistry(
            self.runner.adapter_pool,
            config.max_lora_rank,
            lambda folder: load_adapter(folder, model, weights),
            lambda adapter: pack_adapter(adapter, model, fmt),
            partial(self._news.put, None),
        )
        rows = config.max_num_batched_tokens
        self.scheduler = Scheduler(
            self.pool,
            self.adapters,
            config.block_size,
            config.max_num_seqs,
            rows,
            PROMPT_LOGITS,
            config.enable_prefix_caching,
        )
        self._pace = Pace(
            None if config.max_step_ms is None else config.max_step_ms / 1000, rows, config.num_scheduler_steps
        )
        self._recorder = Recorder(self.adapters.names.__contains__)
        self._results = StepResults(
            self.runner, self.scheduler, self.pool, self.adapters, self._recorder, self.bounds, self.eos
        )
        self._sequences = 0
        # Whether the last step found nothing that could run.
        self.stalled = self._closed = False
        self._stuck = 0
        self._interrupts = Interrupts()
        self._guard = StepGuard()

    # ------------------------------------------------------------ adapters

    def add_adapter(self, source: Path | Adapter, name: str | None = None, weight: float = 1.0) -> AdapterVersion:
        """Register an adapter, or replace the one of that name; without a name it goes by its content.

        A folder is read when a request wants it. Raises NotFoundError, FormatError, AdapterError, UsageError or
        ResourceError.
        """
        if isinstance(source, Path):
            return self.adapters.add(name or str(source), source, weight)
        loaded = self.adapters.read(source)
        return self.adapters.add(name or loaded.packed.digest, source, weight, loaded)

    def remove_adapter(self, name: str, force: bool = False) -> None:
        """Forget an adapter's name: its requests finish first, or with force end at once with an AdapterError.

        Raises NotFoundError, or UsageError while a step is being computed or another thread is in one.
        """
        self._guard.check_settled()
        self.adapters.remove(name)
        self._recorder.forget(name)
        if force:
            error = UnloadedError(f"adapter {name!r} was unloaded")
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                # Those that keep an older version of it, too.
                if any(used.name == name for used in sequence.adapters):
                    self.scheduler.fail(sequence, error)

    # ------------------------------------------------------------ requests

    def submit(
        self,
        tokens: list[int],
        params: SamplingParams,
        uses: tuple[AdapterUse, ...] = (),
        salt: bytes = b"",
        priority: int = 0,
        tenant: str | None = None,
    ) -> list[Sequence]:
        """Queue a prompt; returns its params.n sequences.

        salt: prompts share cached pages with prompts of the same salt only. priority: lower ones go first; tenant:
        who shares fairly with others, None for the first adapter's name. Raises UsageError where it can never run, or
        another thread is in a step, EngineClosedError after close.
        """
        if self._closed:
            raise EngineClosedError("the engine was closed")
        self._guard.check_thread()
        self.bounds.check(tokens, params, uses)
        check_order(salt, priority, tenant)
        seed = params.seed_or_drawn()
        if tenant is None:
            tenant = uses[0].adapter.name if uses else ""
        sequences = []
        for i in range(params.n):
            self._sequences += 1
            sequence = Sequence(self._sequences, list(tokens), len(tokens), params, _as_int64(seed + i), uses, salt)
            sequence.tenant, sequence.priority = tenant, priority
            sequence.weight = uses[0].adapter.weight if uses else 1.0
            sequences.append(sequence)
            self._recorder.submitted(sequence, time.perf_counter())
        self._recorder.asked(params, self.bounds.final_length(len(tokens), params) - len(tokens))
        sequences[0].siblings = sequences[1:]
        self.scheduler.submit(sequences)
        return sequences

    def cancel(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence; its pages and adapters are free at once. Raises UsageError while a step is computed."""
        self._guard.check_settled()
        if sequence.state is not State.FINISHED:
            self.scheduler.finish(sequence, reason)
        if self._recorder.follows(sequence):
            # If it ended in this very step, the reason given here came earlier in its text.
            sequence.finish_reason = reason
            self._recorder.finished(sequence, time.perf_counter())

    def propose(self, sequence: Sequence, tokens: list[int]) -> None:
        """Draft tokens for a text that decodes: one step checks all of them, keeps the right ones and one token more.

        The text is the same, token for token, as without. They are dropped if the text can't take any.
        """
        room = self.bounds.final_length(sequence.prompt_length, sequence.params) - len(sequence.tokens) - 1
        drafts = tokens[: max(0, min(room, PROMPT_LOGITS))]
        if any(not 0 <= token < self.model.vocab_size for token in drafts):
            raise UsageError("a draft token is not in the vocabulary")
        if sequence.state is State.RUNNING and sequence.decodes and not sequence.drafted:
            sequence.tokens += drafts
            sequence.drafted = len(drafts)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do, if only to take in an adapter that is being read."""
        scheduler = self.scheduler
        return bool(scheduler.running or scheduler.waiting or scheduler.failed or self.adapters.loading)

    def wait(self, timeout: float | None = None) -> None:
        """After a step with nothing to do, wait until an adapter was read from disk, if any is being read."""
        if self.stalled and self.adapters.loading:
            with suppress(Empty):
                self._news.get(timeout=timeout)

    # ------------------------------------------------------------ one step

    def step(self, take: Callable[[Output], None] | None = None) -> list[Output]:
        """Run one step; returns the new tokens, in each text's order, and the sequences that ended without one.

        take: called with each of these before the next one counts. It may cancel texts, as where a stop string is
        whole: what else the step has for them is dropped. Ctrl-C comes between two steps, or while one computes, which
        it ends. Raises UsageError within another step, and while another thread is in one.
        """
        with self._interrupts.held_back(), self._guard.step():
            return self._step(take)

    def check_idle(self) -> None:
        """Raise UsageError where no step can begin: within one, or while another thread is in one."""
        self._guard.check_idle()

    def _step(self, take: Callable[[Output], None] | None) -> list[Output]:
        while not self._news.empty():
            self._news.get_nowait()
        self.adapters.collect()
        self._look_up()
        self.scheduler.chunk = self._pace.chunk()
        plan = self.scheduler.schedule()
        self._note_stall(plan)
        outputs = self._run(plan) if plan else []
        outputs += [Output(sequence, None) for sequence in self.scheduler.failed]
        self.scheduler.failed = []
        now = time.perf_counter()
        counted = [output for output in outputs if self._count(output, now, take)]
        if self.config.debug_checks:
            self.check_integrity()
        return counted

    def _count(self, output: Output, now: float, take: Callable[[Output], None] | None) -> bool:
        """Whether an output counts: its text was not cancelled after an earlier one of this step."""
        if not self._recorder.follows(output.sequence):
            return False
        if output.token is not None:
            self._recorder.token(output.sequence, now)
        if take is not None:
            take(output)
        if (output.last or output.token is None) and self._recorder.follows(output.sequence):
            self._recorder.finished(output.sequence, now)
        return True

    def _look_up(self) -> None:
        """Propose what is likely to follow in texts that decode."""
        texts = [s for s in self.scheduler.running if s.generated and s.decodes]
        # Half of a step's rows and logits are for others.
        rows = min(self.config.max_num_batched_tokens, PROMPT_LOGITS) // 2
        most = min(self.config.num_speculative_tokens, rows // max(1, len(texts)))
        price = self._pace.draft_price(len(texts))
        if most < 1 or price >= 1:
            return
        for sequence in texts:
            # Logits processors may remember what they are called with: it must be the text, without drafts.
            if not sequence.drafted and not sequence.params.logits_processors:
                self.propose(sequence, sequence.lookup.propose(sequence.tokens, most, price))

    def _note_stall(self, plan: list[Work]) -> None:
        self.stalled = not plan and not self.scheduler.running
        waits = bool(self.scheduler.waiting) and not self.adapters.loading and not self.scheduler.failed
        stuck = not plan and waits
        self._stuck = self._stuck + 1 if stuck else 0
        if self._stuck > PATIENCE:
            raise AssertionError(f"{len(self.scheduler.waiting)} requests wait and none can run")

    def _run(self, plan: list[Work]) -> list[Output]:
        plan.sort(key=lambda work: ([use.content for use in work.sequence.uses], work.sequence.number))
        decodes = drafted = prompt_rows = 0
        started = time.perf_counter()
        for sequence, length in plan:
            self._recorder.started(sequence, started)
            if sequence.decodes:
                decodes += 1
                drafted += sequence.drafted
            else:
                prompt_rows += length
        self._guard.computing = True
        try:
            for sequence, _ in plan:
                for use in sequence.uses:
                    self.runner.make_room(use.adapter.rank)
            answers, questions = expected(plan)
            draws = [draw for answer in answers for draw in draws_of(answer, self.eos)]
            chunks = [chunk_of(work, self._number) for work in plan]
            rounds = self._rounds(plan)
            with self._interrupts.let_through():
                tokens = self.runner.run(chunks, draws, rounds, ends_of(plan, self.eos) if rounds > 1 else set())
            outputs = self._results.keep(plan, answers, questions, draws, tokens)
        except Exception as error:
            self._give_up(plan, error)
            return []
        finally:
            self._guard.computing = False
        seconds = time.perf_counter() - started
        self._recorder.step(seconds, decodes * len(tokens) + drafted, prompt_rows)
        self._pace.observe(decodes, prompt_rows, seconds / len(tokens), drafted)
        return outputs

    def _number(self, use: AdapterUse) -> int:
        return self.runner.adapter_pool.number(use.adapter.digest or "")

    def _rounds(self, plan: list[Work]) -> int:
        """How many tokens the step gives each text: several where all do nothing but decode, with pages for them."""
        sequences = [work.sequence for work in plan]
        if len(plan) < len(self.scheduler.running) or not all(sequence.repeats for sequence in sequences):
            return 1
        left = [self.bounds.final_length(s.prompt_length, s.params) - len(s.tokens) for s in sequences]
        # A text that ends leaves its place to one that waits; where none does, the longest one counts.
        useful = min(left) if self.scheduler.waiting else max(left)
        room = self.length - max(len(sequence.tokens) for sequence in sequences)
        return self.scheduler.take_ahead(sequences, min(self._pace.rounds(), useful, room))

    def _give_up(self, plan: list[Work], error: Exception) -> None:
        """End the sequences of a step that failed; nothing of what it computed is kept."""
        cause = RequestError(f"the step that computed this request failed: {error!r}")
        cause.__cause__ = error
        copies = [sequence for sequence in self.scheduler.running if not sequence.pending]
        for sequence in [*(work.sequence for work in plan), *copies]:
            self.scheduler.fail(sequence, cause)

    # ------------------------------------------------------------ state

    def warm_up(self) -> None:
        """Compile what the first requests would have to wait for; counters begin anew. Raises UsageError while busy."""
        if self.busy:
            raise UsageError("the engine is at work", "Warm it up before the first request.")
        # Logits as they are, and changed ones, are drawn from by different programs.
        for biases in (None, {0: 1.0}):
            self.submit([0], SamplingParams(max_tokens=2, logprobs=1, ignore_eos=True, logit_bias=biases))
        while self.busy:
            self.step()
        self.adapters.read(tiny_adapter(self.model))
        self._recorder.clear()

    def reset_prefix_cache(self) -> None:
        """Forget what was kept of finished texts."""
        self.pool.forget_all()

    def stats(self) -> Stats:
        """A snapshot; later steps do not change it."""
        adapters, resident, recorder = self.adapters, self.runner.adapter_pool, self._recorder
        running, waiting = self.scheduler.running, self.scheduler.waiting
        return Stats(
            running=len(running),
            waiting=_texts_of(waiting),
            waiting_for_adapters=_texts_of(s for s in waiting if any(version.loading for version in s.adapters)),
            threads=self.runner.team.size,
            steps=recorder.steps,
            step_seconds=recorder.step_seconds,
            pages=self.pool.pages,
            pages_held=self.pool.held,
            pages_cached=self.pool.cached,
            prefix_hits=self.pool.hits,
            prefix_lookups=self.pool.lookups,
            preemptions=self.scheduler.preemptions,
            drafts=recorder.drafts,
            draft_tokens=recorder.draft_tokens,
            accepted_tokens=recorder.accepted_tokens,
            total=recorder.total.copy(),
            course=recorder.course.copy(),
            step_times={kind: times.copy() for kind, times in recorder.step_times.items()},
            load_by_adapter=load_by_adapter(running, waiting),
            adapter_states=adapter_states(adapters.names, resident.__contains__),
            by_adapter={name: traffic.copy() for name, traffic in recorder.by_adapter.items()},
            adapters=AdapterStats(
                registered=len(adapters.names),
                resident=len(resident),
                in_use=resident.in_use,
                bytes=resident.used,
                capacity=resident.capacity,
                hits=resident.hits,
                insertions=resident.insertions,
                evictions=resident.evictions,
                **vars(adapters.counts),
            ),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where the books of pages, adapters or sequences are wrong."""
        self.scheduler.check_integrity()
        self.adapters.check_integrity()
        held: dict[str, int] = {}
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            if sequence.holds_adapters:
                for version in sequence.adapters:
                    held[version.digest or ""] = held.get(version.digest or "", 0) + 1
        self.runner.adapter_pool.check_references(held)

    def close(self) -> None:
        """End the engine's threads."""
        self._closed = True
        self.adapters.close()
        self.runner.close()


def _texts_of(waiting: Iterable[Sequence]) -> int:
    """How many texts wait: siblings wait with the first of them."""
    return sum(1 + len(sequence.siblings) for sequence in waiting)


def _as_int64(number: int) -> int:
    """The number between -2^63 and 2^63 - 1 that differs by a multiple of 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
