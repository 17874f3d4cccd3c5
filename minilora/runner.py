"""The arrays of an engine, and the compiled step over them: pages, adapters, buffers, threads."""

import time
import weakref
from collections.abc import Collection

import numpy as np

from minilora_kernels.attention import part_scratch_size, scratch_size
from minilora_kernels.formats import FLOAT16, FLOAT32, INT8
from minilora_kernels.inputs import GROUP_MIN, Rows
from minilora_kernels.limits import usable_cores
from minilora_kernels.linear import room_bytes
from minilora_kernels.memory import aligned_zeros
from minilora_kernels.pack import BLOCK, ROWS, padded_rows
from minilora_kernels.pages import KV_FLOAT16, KV_FLOAT32, SPLIT
from minilora_kernels.team import Each, Team

from . import numa
from .adapter_pool import AdapterPool
from .batch import ROWS_PER_TILE, Chunk, Draw, Packer, split_size
from .cache import KV_FORMATS, copy_page, make_kv, page_bytes, poison_page
from .errors import ResourceError
from .memory import free_memory
from .model import CHUNK_BLOCKS, FEW, MOST_ROWS, Buffers, Fixed, Shape, make_step
from .params import MOST_LORAS, EngineConfig
from .sampler import Sampler
from .thread_count import ThreadCount
from .weights import Network, Weights

KV_SHARE, ADAPTER_SHARE = 0.5, 0.25
PROMPT_LOGITS = 64
AUTOMATIC_SLOTS = 256
LORA_FORMATS = {"float32": FLOAT32, "float16": FLOAT16, "int8": INT8}


class Runner:
    """Runs chunks of sequences through the model. length: tokens that a sequence may have.

    Raises ResourceError where the memory does not suffice.
    """

    def __init__(self, weights: Weights, config: EngineConfig, length: int):
        self.weights, self.model, self.config, self.length = weights, weights.config, config, length
        self._exact = weights.formats == (FLOAT32,)
        threads = config.threads or usable_cores()
        self._nodes = numa.nodes() if config.numa != "off" else []
        self._places = numa.assign(threads, self._nodes) if self._nodes else []
        self.team = Team(threads, [place.cpus for place in self._places] or None)
        # Threads that wait for a run would keep the arrays of the last one, weights included, once the engine is gone.
        weakref.finalize(self, self.team.dismiss).atexit = False
        self._thread_count = ThreadCount(self.team.size)
        free = free_memory()
        self._setup_pages(int(free * KV_SHARE))
        self._setup_adapters(int(free * ADAPTER_SHARE))
        self._setup_buffers()
        self._networks = self._place_weights(free)
        self._step = make_step(
            weights.formats, self.kv_format, self.adapter_pool.format, 16 if self.model.head_dim % 64 else 64
        )
        self._prepare()

    def _setup_pages(self, most: int) -> None:
        config, page = self.config, self.config.block_size
        automatic = KV_FLOAT32 if self._exact else KV_FLOAT16
        self.kv_format = KV_FORMATS.get(config.kv_cache_dtype, automatic)
        size = page_bytes(self.model, self.kv_format, page)
        if config.kv_cache_memory is not None:
            self.pages = config.kv_cache_memory // size
        else:
            self.pages = min(-(-self.length // page) * config.max_num_seqs, most // size)
        if self.pages < 1 and config.kv_cache_memory is not None:
            raise ResourceError(
                f"kv_cache_memory is {config.kv_cache_memory} bytes, but one page takes {size}",
                "Raise it to at least that.",
            )
        if self.pages < 1:
            raise ResourceError(
                f"half of the free memory, {most} bytes, does not hold one KV page of {size} bytes",
                "Free some memory, or set kv_cache_memory.",
            )
        try:
            self.kv = make_kv(self.model, self.kv_format, self.pages, page)
        except MemoryError:
            raise ResourceError(
                f"no memory for {self.pages} pages of {size} bytes", "Lower kv_cache_memory or max_model_len."
            ) from None
        self._spread(self.kv.numbers, self.kv.scales)

    def _spread(self, *arrays: np.ndarray) -> None:
        """Spread new memory that all threads share over all nodes."""
        for array in arrays if self._nodes else ():
            numa.spread(array, self._nodes)

    def _place_weights(self, free: int) -> list[Network]:
        """The network: one for all threads, or for each thread the nearest copy."""
        network, arena = self.weights.network(self.length), self.weights.arena
        if self.config.numa == "interleave":
            return [network._replace(arena=numa.copy_to(arena, self._nodes))]
        if self.config.numa == "off":
            return [network]
        used = set(self._places)
        if len(used) * len(arena) > free:
            raise ResourceError(
                f"no memory for {len(used)} copies of {len(arena)} bytes of weights", "Use --numa interleave."
            )
        copies = {node: network._replace(arena=numa.copy_to(arena, [node])) for node in used}
        return [copies[node] for node in self._places]

    def _fix(self) -> None:
        """Put together what all steps share."""
        rest = self._shape, self.kv, self.adapter_pool.arrays, self._buffers
        fixed = Each(Fixed(network, *rest) for network in self._networks)
        self._fixed = fixed if len(fixed) > 1 else fixed[0]

    def _setup_adapters(self, most: int) -> None:
        config = self.config
        self.adapter_pool = AdapterPool(
            self.model,
            config.max_cpu_loras or max(config.max_loras, AUTOMATIC_SLOTS),
            config.lora_memory if config.lora_memory is not None else most,
            LORA_FORMATS.get(config.lora_dtype, FLOAT32 if self._exact else INT8),
            config.max_loras,
        )
        self._spread(self.adapter_pool.arrays.arena)

    def _setup_buffers(self) -> None:
        model, config, threads = self.model, self.config, self.team.size
        padded = int(self.weights.matrices[self.weights.head, ROWS])
        logits = config.max_num_seqs + PROMPT_LOGITS
        part = split_size(model.heads, model.head_dim)
        parts = part * -(-self.length // SPLIT) * max(1, 4 * threads // model.kv_heads)
        rows = config.max_num_batched_tokens
        tile = scratch_size(max(ROWS_PER_TILE, model.group), model.head_dim)
        long = part_scratch_size(model.kv_heads, model.group, model.head_dim)
        scratch = max(tile, long, MOST_ROWS * CHUNK_BLOCKS * BLOCK, padded_rows(model.hidden_size))
        qkv, room = padded_rows(model.qkv_rows), room_bytes(self.weights.matrices)
        self._buffers = Buffers(
            x=_floats(rows * model.hidden_size),
            a=_rows(max(rows, logits) + threads * FEW, max(model.hidden_size, model.heads * model.head_dim)),
            b=_rows(rows, model.intermediate_size),
            qkv=_floats(rows * qkv),
            qkv_stride=qkv,
            s=_floats(1),
            s_stride=0,
            scratch=_floats(threads * scratch),
            scratch_stride=scratch,
            parts=_floats(parts),
            unpacked=aligned_zeros(threads * room, np.uint8),
            unpacked_stride=room,
            logits=_floats(logits * padded),
            bests=np.zeros(logits * threads, np.int64),
            chances=_floats(threads * padded),
            ids=np.empty(threads * padded, np.int64),
            shared=max(rows, logits),
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
        self._packer = Packer(model.group, model.kv_heads, part, parts, 4 * threads)
        self.sampler = Sampler(self.team, self._buffers, padded, model.vocab_size)

    def _prepare(self) -> None:
        """Compile the step, or fetch its machine code, before the first request."""
        self._fix()
        self.team.prepare(self._step, self._packer.pack([], []), self._fixed)

    def run(
        self, chunks: list[Chunk], draws: list[Draw], rounds: int = 1, ends: Collection[int] = ()
    ) -> list[list[int | Exception]]:
        """One step: keys and values go to the chunks' pages, the wanted logits to the sampler's rows, in order.

        Chunks with equal adapters must be neighbours. Returns for each round a token for each draw, or why there is
        none. rounds, ends: see Packer.pack.
        """
        started = time.perf_counter()
        plain = [draw for draw in draws if not draw.params.changes_logits]
        batch = self._packer.pack(chunks, plain, rounds, ends)
        self.team.run(self._step, batch, self._fixed)
        self._thread_count.observe(time.perf_counter() - started, self.team.lost)
        self.team.active = self._thread_count.size
        return self.sampler.draw(draws, batch.chosen)

    def make_room(self, rank: int) -> None:
        """Let the buffer of shrunk rows hold the columns of adapters of this rank."""
        ranks = 3 * padded_rows(rank)
        if ranks > self._packer.ranks:
            stride = ranks * MOST_LORAS
            self._buffers = self._buffers._replace(s=_floats(self._buffers.shared * stride), s_stride=stride)
            self._packer.ranks = ranks
            self._fix()

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page of every layer."""
        copy_page(self.kv, source, target)

    def poison_page(self, page: int) -> None:
        """Fill a page with NaN."""
        poison_page(self.kv, page)

    def close(self) -> None:
        """End the threads."""
        self.team.close()


def _floats(count: int) -> np.ndarray:
    return aligned_zeros(count, np.float32)


def _rows(count: int, width: int) -> Rows:
    """Room for rows of a product's input. The odd cache line keeps rows off each other's cache sets."""
    stride = padded_rows(width) + 64
    groups = count * stride // GROUP_MIN
    return Rows(
        _floats(count * stride),
        aligned_zeros(count * stride, np.int16),
        aligned_zeros(count * stride, np.int8),
        aligned_zeros(count * stride, np.int16),
        _floats(groups),
        aligned_zeros(groups, np.int32),
        _floats(groups),
        stride,
    )
