"""What an engine has done and what it is doing: counters that it keeps, and a snapshot of them for others."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .sequence import Sequence

# Upper bounds of the buckets, seconds; the last bucket has none.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Histogram:
    """Durations. counts: how many fell into each bucket of BUCKETS and above the last; total: their sum, seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def copy(self) -> "Histogram":
        """Another with the same content."""
        return Histogram(list(self.counts), self.total)


@dataclass
class Traffic:
    """Of one adapter, or of all requests. finished: by finish_reason; times in seconds.

    time_to_first_token: from submission; inter_token_time: between two tokens of a text; latency: from submission to
    the last token.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_time: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)

    def copy(self) -> "Traffic":
        """Another with the same content."""
        times = (self.time_to_first_token.copy(), self.inter_token_time.copy(), self.latency.copy())
        return Traffic(
            self.requests, self.prompt_tokens, self.cached_tokens, self.generated_tokens, Counter(self.finished), *times
        )


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
class Stats:
    """An engine at one moment; counters since its start. pages_cached: not held, kept for texts that begin alike."""

    running: int
    waiting: int
    steps: int
    step_seconds: float
    pages: int
    pages_held: int
    pages_cached: int
    prefix_hits: int
    prefix_lookups: int
    preemptions: int
    total: Traffic
    by_adapter: dict[str, Traffic]
    adapters: AdapterStats


class Recorder:
    """Keeps the counters, for all requests and for each adapter by name, "" for requests without one.

    is_known: whether a name is still registered; others are not told apart.
    """

    def __init__(self, is_known: Callable[[str], bool]):
        self._is_known = is_known
        self.total = Traffic()
        self.by_adapter: dict[str, Traffic] = {}
        self.steps = 0
        self.step_seconds = 0.0

    def _of(self, sequence: Sequence) -> list[Traffic]:
        names = {version.name for version in sequence.adapters} or {""}
        known = [name for name in names if not name or self._is_known(name)]
        return [self.total, *(self.by_adapter.setdefault(name, Traffic()) for name in known)]

    def submitted(self, sequence: Sequence, now: float) -> None:
        """Note a new sequence."""
        sequence.times.submitted = now
        for traffic in self._of(sequence):
            traffic.requests += 1

    def token(self, sequence: Sequence, now: float) -> None:
        """Note a new token."""
        times = sequence.times
        for traffic in self._of(sequence):
            traffic.generated_tokens += 1
            if times.last_token is None:
                traffic.prompt_tokens += sequence.prompt_length
                traffic.cached_tokens += min(sequence.cached, sequence.prompt_length)
                traffic.time_to_first_token.add(now - times.submitted)
            else:
                traffic.inter_token_time.add(now - times.last_token)
        times.last_token = now

    def finished(self, sequence: Sequence, now: float) -> None:
        """Note the end of a sequence."""
        for traffic in self._of(sequence):
            traffic.finished[sequence.finish_reason or ""] += 1
            traffic.latency.add(now - sequence.times.submitted)

    def step(self, seconds: float) -> None:
        """Note a step."""
        self.steps += 1
        self.step_seconds += seconds

    def forget(self, name: str) -> None:
        """Drop an adapter's own counters: its name is gone."""
        self.by_adapter.pop(name, None)
