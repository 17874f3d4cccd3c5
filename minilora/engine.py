"""The engine: schedule, pack, run, sample, retire. Token ids only."""

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import psutil

from minilora_kernels.attention import KV_FLOAT16, KV_FLOAT32, scratch_size
from minilora_kernels.linear import Rows
from minilora_kernels.pack import BLOCK, FLOAT16, FLOAT32, ROWS, padded_rows
from minilora_kernels.team import Team

from .adapters import Adapter, PackedAdapter
from .batch import ROWS_PER_TILE, Chunk, Packer, Use, split_size
from .cache import KV_FORMATS, PagePool, copy_page, make_kv, page_bytes
from .errors import ResourceError, UsageError
from .model import CHUNK_BLOCKS, FEW, MOST_ROWS, Buffers, Shape, make_step
from .params import EngineConfig, SamplingParams
from .pool import AdapterPool
from .sampler import Draw, Sampler
from .scheduler import Scheduler, Work
from .sequence import AdapterUse, Sequence, State, TokenLogprobs
from .weights import Weights

MEMORY_SHARE = 0.5
MOST_USES = 8
PROMPT_LOGITS = 64


class Output(NamedTuple):
    """A new token of a sequence; logprobs where its parameters ask for them."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None


def usable_cores() -> int:
    """Cores that this process may really use: its affinity, and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


class Engine:
    """Runs any number of texts through one model, with any adapters, step by step.

    eos: tokens that end a text. Raises ResourceError where the memory does not suffice.
    """

    def __init__(self, weights: Weights, config: EngineConfig | None = None, eos: Iterable[int] = ()):
        self.weights, self.model = weights, weights.config
        self.config = config = config or EngineConfig()
        self.eos = frozenset(eos)
        self.length = config.max_model_len or self.model.max_position_embeddings
        self.team = Team(config.threads or usable_cores())
        self._exact = weights.formats == (FLOAT32,)
        self._setup_pages()
        self._setup_adapters()
        self._setup_step()
        self._sequences = 0
        self._prepare()

    # ------------------------------------------------------------ setup

    def _setup_pages(self) -> None:
        config, page = self.config, self.config.block_size
        automatic = KV_FLOAT32 if self._exact else KV_FLOAT16
        self.kv_format = KV_FORMATS.get(config.kv_cache_dtype, automatic)
        size = page_bytes(self.model, self.kv_format, page)
        longest = -(-self.length // page)
        pages = longest * config.max_num_seqs
        if config.kv_cache_memory is not None:
            pages = config.kv_cache_memory // size
        else:
            pages = min(pages, int(psutil.virtual_memory().available * MEMORY_SHARE) // size)
        if pages < 1:
            raise ResourceError(f"no memory for a single page of {size} bytes", "Raise kv_cache_memory.")
        self.pool = PagePool(pages)
        try:
            self.kv = make_kv(self.model, self.kv_format, pages, page)
        except MemoryError:
            raise ResourceError(
                f"no memory for {pages} pages of {size} bytes", "Lower kv_cache_memory or max_model_len."
            ) from None

    def _setup_adapters(self) -> None:
        fmt = FLOAT32 if self._exact else FLOAT16
        self.adapters = AdapterPool(self.model, self.config.max_loras, self.config.lora_memory, fmt)
        self._packed: dict[str, PackedAdapter] = {}

    def _setup_step(self) -> None:
        model, config, threads = self.model, self.config, self.team.size
        padded = int(self.weights.matrices[self.weights.head, ROWS])
        self._most_logits = config.max_num_seqs + PROMPT_LOGITS
        part = split_size(model.heads, model.head_dim)
        parts = part * -(-self.length // 256) * max(1, 4 * threads // model.kv_heads)
        rows = config.max_num_batched_tokens
        scratch = max(scratch_size(max(ROWS_PER_TILE, model.group), model.head_dim), MOST_ROWS * CHUNK_BLOCKS * BLOCK)
        qkv = padded_rows(model.qkv_rows)
        self._buffers = Buffers(
            x=_floats(rows * model.hidden_size),
            a=_rows(max(rows, self._most_logits) + threads * FEW, max(model.hidden_size, model.heads * model.head_dim)),
            b=_rows(rows, model.intermediate_size),
            qkv=_floats(rows * qkv),
            qkv_stride=qkv,
            s=_floats(1),
            s_stride=0,
            scratch=_floats(threads * scratch),
            scratch_stride=scratch,
            parts=_floats(parts),
            logits=_floats(self._most_logits * padded),
            shared=max(rows, self._most_logits),
        )
        self._shape = Shape(
            model.layers,
            model.hidden_size,
            model.heads,
            model.kv_heads,
            model.head_dim,
            model.intermediate_size,
            model.vocab_size,
            np.float32(model.rms_norm_eps),
        )
        self._network = self.weights.network(self.length)
        self._step = make_step(self.weights.formats, self.kv_format, self.adapters.format)
        self._packer = Packer(model.group, model.kv_heads, part, parts, 4 * threads)
        self._sampler = Sampler(self.team, self._buffers.logits, padded, model.vocab_size)
        self.scheduler = Scheduler(
            self.pool,
            config.block_size,
            config.max_num_seqs,
            rows,
            PROMPT_LOGITS,
            self._acquire,
            self._release,
            config.enable_prefix_caching,
        )

    def _prepare(self) -> None:
        """Compile the step, or fetch its machine code, before the first request."""
        batch = self._packer.pack([])
        self.team.prepare(self._step, self._network, self._shape, self.kv, batch, self.adapters.arrays, self._buffers)

    # ------------------------------------------------------------ adapters

    def add_adapter(self, adapter: Adapter) -> str:
        """Make an adapter known; returns its digest. Raises UsageError where its rank is too high."""
        if adapter.rank > self.config.max_lora_rank:
            raise UsageError(
                f"an adapter of rank {adapter.rank}, but max_lora_rank is {self.config.max_lora_rank}",
                "Raise max_lora_rank.",
            )
        self._make_room(3 * padded_rows(adapter.rank))
        if adapter.digest not in self._packed:
            self._packed[adapter.digest] = self.adapters.pack(adapter)
        return adapter.digest

    def _make_room(self, ranks: int) -> None:
        """Let the buffer of shrunk rows hold `ranks` columns for each adapter of a row."""
        if ranks > self._packer.ranks:
            buffers, stride = self._buffers, ranks * MOST_USES
            self._buffers = buffers._replace(s=_floats(buffers.shared * stride), s_stride=stride)
            self._packer.ranks = ranks

    def _acquire(self, sequence: Sequence) -> bool:
        held: list[str] = []
        for use in sequence.uses:
            if not self.adapters.insert(use.digest, self._packed[use.digest]):
                for digest in held:
                    self.adapters.release(digest)
                return False
            self.adapters.acquire(use.digest)
            held.append(use.digest)
        return True

    def _release(self, sequence: Sequence) -> None:
        for use in sequence.uses:
            self.adapters.release(use.digest)

    # ------------------------------------------------------------ requests

    def submit(
        self, tokens: list[int], params: SamplingParams, uses: tuple[AdapterUse, ...] = (), salt: bytes = b""
    ) -> list[Sequence]:
        """Queue a prompt; returns its params.n sequences. Raises UsageError where it can never run."""
        self._check(tokens, params, uses)
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        sequences = []
        for i in range(params.n):
            self._sequences += 1
            sequences.append(Sequence(self._sequences, list(tokens), len(tokens), params, seed + i, uses, salt))
        sequences[0].siblings = sequences[1:]
        self.scheduler.add(sequences[0])
        return sequences

    def _check(self, tokens: list[int], params: SamplingParams, uses: tuple[AdapterUse, ...]) -> None:
        if not tokens:
            raise UsageError("the prompt is empty", "Give at least one token.")
        if wrong := [t for t in tokens if not 0 <= t < self.model.vocab_size]:
            raise UsageError(f"the prompt holds token {wrong[0]}, the vocabulary has {self.model.vocab_size}")
        if len(tokens) >= self.length:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, the model takes {self.length - 1} at most",
                "Shorten it, or raise max_model_len if the model was trained for more.",
            )
        if self._final_length(len(tokens), params) > self.pool.pages * self.config.block_size:
            raise UsageError(
                f"{len(tokens)} tokens and max_tokens do not fit into {self.pool.pages} KV pages",
                "Lower max_tokens or raise kv_cache_memory.",
            )
        if params.n > self.config.max_num_seqs:
            raise UsageError(f"n is {params.n}, but max_num_seqs is {self.config.max_num_seqs}")
        if len(uses) > min(MOST_USES, self.config.max_loras):
            most = min(MOST_USES, self.config.max_loras)
            raise UsageError(f"{len(uses)} adapters in one request, at most {most} are possible")
        params.check_vocabulary(self.model.vocab_size)
        for use in uses:
            if use.digest not in self._packed:
                raise UsageError(f"adapter {use.digest[:12]} is not known")

    def _final_length(self, prompt: int, params: SamplingParams) -> int:
        return self.length if params.max_tokens is None else min(prompt + params.max_tokens, self.length)

    def cancel(self, sequence: Sequence, reason: str = "abort") -> None:
        """End a sequence; its pages and adapters are free at once."""
        if sequence.state is not State.FINISHED:
            self.scheduler.finish(sequence, reason)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    # ------------------------------------------------------------ one step

    def step(self) -> list[Output]:
        """Run one step; returns the new tokens."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        plan.sort(key=lambda work: (work.sequence.uses, work.sequence.number))
        batch = self._packer.pack([self._chunk(work) for work in plan])
        self.team.run(self._step, self._network, self._shape, self.kv, batch, self.adapters.arrays, self._buffers)
        return self._finish_step(plan)

    def _chunk(self, work: Work) -> Chunk:
        sequence, end = work.sequence, work.sequence.computed + work.length
        uses = tuple(Use(self.adapters.number(use.digest), use.scale) for use in sequence.uses)
        first = end - 1 if end == len(sequence.tokens) else end
        if sequence.wants_prompt_logprobs:
            first = sequence.computed
        return Chunk(sequence.tokens, sequence.computed, work.length, sequence.pages, uses, first)

    def _finish_step(self, plan: list[Work]) -> list[Output]:
        """Note what was computed, draw the new tokens, start copies, and end what is done."""
        row, draws, targets = 0, [], []
        questions: list[tuple[int, int, int]] = []
        asking: list[Sequence] = []
        for work in plan:
            sequence, start = work.sequence, work.sequence.computed
            done = start + work.length == len(sequence.tokens)
            if sequence.wants_prompt_logprobs:
                count = sequence.params.prompt_logprobs or 0
                places = range(start, min(start + work.length, sequence.prompt_length - 1))
                questions += [(row + place - start, sequence.tokens[place + 1], count) for place in places]
                asking += [sequence] * len(places)
                last = row + work.length - 1
                row += work.length
            else:
                last = row
                row += done
            self.scheduler.computed(sequence, work.length)
            if done:
                for target in (sequence, *sequence.siblings):
                    draws.append(self._draw(target, last))
                    targets.append((target, last))
                self._start_copies(sequence)
        for sequence, found in zip(asking, self._sampler.look_up(questions), strict=True):
            sequence.prompt_logprobs.append(found)
        tokens = self._sampler.draw(draws) if draws else []
        chosen = self._logprobs(targets, tokens)
        return [
            self._append(target, token, chosen.get(target)) for (target, _), token in zip(targets, tokens, strict=True)
        ]

    def _draw(self, sequence: Sequence, row: int) -> Draw:
        cut, params = sequence.prompt_length, sequence.params
        barred = (*self.eos, *(params.stop_token_ids or ())) if params.min_tokens else ()
        if not params.changes_logits:
            return Draw(row, params, sequence.seed, len(sequence.tokens), [], [], barred)
        return Draw(
            row, params, sequence.seed, len(sequence.tokens), sequence.tokens[:cut], sequence.tokens[cut:], barred
        )

    def _logprobs(self, targets: list[tuple[Sequence, int]], tokens: list[int]) -> dict[Sequence, TokenLogprobs]:
        asked = [(s, row, t) for (s, row), t in zip(targets, tokens, strict=True) if s.params.logprobs is not None]
        found = self._sampler.look_up([(row, token, s.params.logprobs or 0) for s, row, token in asked])
        return {sequence: logprobs for (sequence, *_), logprobs in zip(asked, found, strict=True)}

    def _start_copies(self, sequence: Sequence) -> None:
        """Siblings share the full pages of a finished prompt and copy the last one."""
        full = sequence.computed // self.config.block_size
        rest = sequence.pages[full:]
        for sibling in sequence.siblings:
            if self.pool.available >= len(rest) and self._acquire(sibling):
                copies = [self.pool.take() for _ in rest]
                for source, target in zip(rest, copies, strict=True):
                    copy_page(self.kv, source, target)
                for page in sequence.pages[:full]:
                    self.pool.share(page)
                sibling.pages, sibling.computed = sequence.pages[:full] + copies, sequence.computed
            sibling.cached, sibling.prompt_logprobs = sequence.computed, sequence.prompt_logprobs
            self.scheduler.start_copy(sibling)
        sequence.siblings = []

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Output:
        sequence.tokens.append(token)
        params = sequence.params
        enough = sequence.generated >= params.min_tokens
        if enough and token in (params.stop_token_ids or ()):
            sequence.stop_token = token
            self.scheduler.finish(sequence, "stop")
        elif enough and token in self.eos and not params.ignore_eos:
            self.scheduler.finish(sequence, "stop")
        elif len(sequence.tokens) >= self._final_length(sequence.prompt_length, params):
            self.scheduler.finish(sequence, "length")
        return Output(sequence, token, logprobs)

    def close(self) -> None:
        """End the engine's threads."""
        self.team.close()


def _floats(count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


def _rows(count: int, width: int) -> Rows:
    """Room for rows of a product's input. The odd cache line keeps rows off each other's cache sets."""
    stride = padded_rows(width) + 64
    groups = count * stride // 32
    return Rows(
        _floats(count * stride),
        np.zeros(count * stride, np.int8),
        _floats(groups),
        np.zeros(groups, np.int32),
        _floats(groups),
        stride,
    )
