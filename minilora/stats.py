"""What an engine has done and what it is doing: counters that it keeps, and a snapshot of them for others."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Self

from .params import SamplingParams
from .registry import AdapterVersion
from .sequence import Sequence

# Upper bounds of buckets: all of vLLM's, so that panels made for it fit, and finer or wider ones where CPUs need them.
# The last bucket has no bound.
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 60.0),
    *(80.0, 120.0, 160.0, 640.0, 2560.0),
)
TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_SECONDS = (
    *(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))
TEXTS = (1, 2, 5, 10, 20, 50, 100)
PREEMPTIONS = (0, 1, 2, 5, 10, 20, 50)

STEP_KINDS = ("prefill", "decode", "mixed")


@dataclass
class Histogram:
    """Values counted by size. bounds: upper ends of the buckets; counts: how many fell into each, and above the last;
    total: their sum."""

    bounds: tuple[float, ...] = REQUEST_SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def add(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Histogram":
        """Another with the same content."""
        return Histogram(self.bounds, list(self.counts), self.total)


class _Copies:
    """A dataclass of numbers, counters and histograms."""

    def copy(self) -> Self:
        """Another with the same content."""
        values = (getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        return type(self)(*(value.copy() if isinstance(value, Histogram | Counter) else value for value in values))


@dataclass
class Traffic(_Copies):
    """Texts of one adapter, or of all. requests: how many (n of a request with n); finished: by finish_reason; times in
    seconds.

    time_to_first_token: from submission; inter_token_time: between two tokens of a text; latency: from submission to
    the last token. last_request: when the newest came, on the engine's clock, None before the first.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    time_to_first_token: Histogram = field(default_factory=partial(Histogram, FIRST_TOKEN_SECONDS))
    inter_token_time: Histogram = field(default_factory=partial(Histogram, TOKEN_SECONDS))
    latency: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    last_request: float | None = None


@dataclass
class Course(_Copies):
    """How texts went through the engine, of all adapters together; noted at their end. Times in seconds.

    queue_time: from submission to the first step; prefill_time: from there to the first token; decode_time: from
    there to the last; inference_time: the last two; time_per_token: decode_time by tokens after the first.
    texts, max_tokens: as asked for, noted at submission. step_tokens: rows of a step.
    """

    queue_time: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    prefill_time: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    decode_time: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    inference_time: Histogram = field(default_factory=partial(Histogram, REQUEST_SECONDS))
    time_per_token: Histogram = field(default_factory=partial(Histogram, TOKEN_SECONDS))
    prompt_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    generated_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    preemptions: Histogram = field(default_factory=partial(Histogram, PREEMPTIONS))
    texts: Histogram = field(default_factory=partial(Histogram, TEXTS))
    max_tokens: Histogram = field(default_factory=partial(Histogram, TOKENS))
    step_tokens: Histogram = field(default_factory=partial(Histogram, STEP_TOKENS))


@dataclass(frozen=True)
class AdapterStats:
    """resident: in the pool; in_use: held by requests; bytes: that are resident; hits: starts that found their adapter
    there; loads, load_seconds, longest_load, failures: reading from disk; insertions, swap_seconds: putting them there;
    evictions: that made room for others."""

    registered: int
    resident: int
    in_use: int
    bytes: int
    capacity: int
    hits: int
    insertions: int
    evictions: int
    loads: int
    failures: int
    load_seconds: float
    longest_load: float
    swap_seconds: float


@dataclass(frozen=True)
class AdapterState:
    """A registered adapter. state: "disk" until a request wants it, "loading", "memory" when read, "resident" in the
    pool, "failed" where it could not be read; bytes: that it takes, 0 before it was read."""

    state: str
    rank: int
    bytes: int


@dataclass(frozen=True)
class Load:
    """Sequences that run and that wait."""

    running: int = 0
    waiting: int = 0


@dataclass(frozen=True)
class Stats:
    """An engine at one moment; counters since its start.

    waiting_for_adapters: of those waiting, whose adapters are being read. pages_cached: not held, kept for texts that
    begin alike. drafts: how often tokens of a text were drafted; draft_tokens, accepted_tokens: how many were, and
    how many of them were right. by_adapter, load_by_adapter: by name, "" for requests without one; load_by_adapter has
    those that run or wait only. step_times: by STEP_KINDS.
    """

    running: int
    waiting: int
    waiting_for_adapters: int
    threads: int
    steps: int
    step_seconds: float
    pages: int
    pages_held: int
    pages_cached: int
    prefix_hits: int
    prefix_lookups: int
    preemptions: int
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    total: Traffic
    course: Course
    step_times: dict[str, Histogram]
    by_adapter: dict[str, Traffic]
    load_by_adapter: dict[str, Load]
    adapter_states: dict[str, AdapterState]
    adapters: AdapterStats


class Recorder:
    """Keeps the counters, for all requests and for each adapter by name, "" for requests without one.

    is_known: whether a name is still registered; others are not told apart.
    """

    def __init__(self, is_known: Callable[[str], bool]):
        self._is_known = is_known
        self.clear()

    def clear(self) -> None:
        """Begin anew; texts under way are not followed any more."""
        self.total, self.course = Traffic(), Course()
        self.by_adapter: dict[str, Traffic] = {}
        # Of each sequence under way, by number: the counters that it goes into.
        self._ledgers: dict[int, list[Traffic]] = {}
        self.steps = 0
        self.step_seconds = 0.0
        self.drafts = self.draft_tokens = self.accepted_tokens = 0
        self.step_times = {kind: Histogram(STEP_SECONDS) for kind in STEP_KINDS}

    def asked(self, params: SamplingParams, max_tokens: int) -> None:
        """Note what a request asks for. max_tokens: that its texts can have."""
        self.course.texts.add(params.n)
        self.course.max_tokens.add(max_tokens)

    def submitted(self, sequence: Sequence, now: float) -> None:
        """Note a new sequence."""
        sequence.times.submitted = now
        known = [name for name in names_of(sequence) if not name or self._is_known(name)]
        self._ledgers[sequence.number] = [self.total, *(self.by_adapter.setdefault(name, Traffic()) for name in known)]
        for traffic in self._ledgers[sequence.number]:
            traffic.requests += 1
            traffic.last_request = now

    def started(self, sequence: Sequence, now: float) -> None:
        """Note that a sequence takes part in a step; only the first time counts."""
        if sequence.times.started is None:
            sequence.times.started = now

    def follows(self, sequence: Sequence) -> bool:
        """Whether it is under way, as far as was noted."""
        return sequence.number in self._ledgers

    def token(self, sequence: Sequence, now: float) -> None:
        """Note a new token."""
        times = sequence.times
        times.tokens += 1
        for traffic in self._ledgers[sequence.number]:
            traffic.generated_tokens += 1
            if times.last_token is None:
                traffic.prompt_tokens += sequence.prompt_length
                traffic.cached_tokens += min(sequence.cached, sequence.prompt_length)
                traffic.time_to_first_token.add(now - times.submitted)
            else:
                traffic.inter_token_time.add(now - times.last_token)
        times.first_token = now if times.first_token is None else times.first_token
        times.last_token = now

    def finished(self, sequence: Sequence, now: float) -> None:
        """Note the end of a sequence."""
        for traffic in self._ledgers.pop(sequence.number):
            traffic.finished[sequence.finish_reason or ""] += 1
            traffic.latency.add(now - sequence.times.submitted)
        times, course = sequence.times, self.course
        course.prompt_tokens.add(sequence.prompt_length)
        course.generated_tokens.add(times.tokens)
        course.preemptions.add(sequence.preemptions)
        if times.started is None:
            return
        course.queue_time.add(times.started - times.submitted)
        if times.first_token is None or times.last_token is None:
            return
        decode = times.last_token - times.first_token
        course.prefill_time.add(times.first_token - times.started)
        course.decode_time.add(decode)
        course.inference_time.add(times.last_token - times.started)
        if times.tokens > 1:
            course.time_per_token.add(decode / (times.tokens - 1))

    def step(self, seconds: float, decodes: int, prompt_rows: int) -> None:
        """Note a step with so many rows of texts that decode, and of prompts."""
        self.steps += 1
        self.step_seconds += seconds
        self.course.step_tokens.add(decodes + prompt_rows)
        kind = "decode" if not prompt_rows else "mixed" if decodes else "prefill"
        self.step_times[kind].add(seconds)

    def drafted(self, proposed: int, accepted: int) -> None:
        """Note how many tokens of a text were drafted, and how many of them were right."""
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted_tokens += accepted

    def forget(self, name: str) -> None:
        """Drop an adapter's own counters: its name is gone."""
        self.by_adapter.pop(name, None)


def names_of(sequence: Sequence) -> set[str]:
    """The names of a sequence's adapters, {""} without any."""
    return {version.name for version in sequence.adapters} or {""}


def load_by_adapter(running: Iterable[Sequence], waiting: Iterable[Sequence]) -> dict[str, Load]:
    """How many sequences of each adapter run and wait."""
    runs = Counter(name for sequence in running for name in names_of(sequence))
    waits = Counter(name for first in waiting for one in (first, *first.siblings) for name in names_of(one))
    return {name: Load(runs[name], waits[name]) for name in sorted(runs | waits)}


def adapter_states(
    names: Mapping[str, AdapterVersion], is_resident: Callable[[str | None], bool]
) -> dict[str, AdapterState]:
    """Where each registered adapter is."""
    return {name: AdapterState(_state(v, is_resident), v.rank, v.size) for name, v in names.items()}


def _state(version: AdapterVersion, is_resident: Callable[[str | None], bool]) -> str:
    if version.error is not None:
        return "failed"
    if version.digest is not None and is_resident(version.digest):
        return "resident"
    if version.packed is not None:
        return "memory"
    return "loading" if version.loading else "disk"
