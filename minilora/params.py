"""What a request may ask for, and how an engine is set up: SamplingParams and EngineConfig, vLLM's names.

Options of the command line are made from what is here, so nothing heavy is imported.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    import numpy as np

MOST_SEQUENCES = 128
MOST_STOPS = 16
LONGEST_STOP = 1024
MOST_LOGPROBS = 100
MOST_BIASES = 1024
# Adapters that a request may apply at once, and the highest rank of one.
MOST_LORAS, HIGHEST_RANK = 8, 256


def _real(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    # A comparison with NaN is false, and math.isfinite fails on integers beyond float's range.
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise UsageError(f"{name} must be a number in {bracket}{low:g}, {high:g}], not {shown(value)}", param=name)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} must be an integer from {low} to {high}, not {shown(value)}", param=name)


def _yes_or_no(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be true or false, not {shown(value)}", param=name)


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    if value is not None and not isinstance(value, list | tuple | set | frozenset):
        raise UsageError(f"{name} must be a list, not {shown(value)}", param=name)
    return tuple(value or ())


def shown(value: Any) -> str:
    """A value as an error names it: short, however long it is. (Python refuses to print integers of 5000 digits.)"""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of many digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


LogitsProcessor = Callable[[list[int], list[int], "np.ndarray"], "np.ndarray | None"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when a text ends. Raises UsageError for values that make no sense.

    n: texts for each prompt. temperature: 0 always takes the best token. top_p: keep the smallest set of most likely
    tokens whose probabilities reach this sum; top_k: keep this many (0 or -1: all); min_p: keep those with at least
    this share of the best one's probability. repetition_penalty: divides the logits of tokens seen in prompt or text
    (CTRL, arXiv:1909.05858); presence_penalty, frequency_penalty: subtracted from those of tokens in the text, once, or
    for each occurrence. seed: None draws one. stop: strings that end the text; stop_token_ids: tokens that do;
    include_stop_str_in_output: the text keeps what ended it, except for the model's own end; ignore_eos: go on past
    that end. max_tokens: None for as many as fit; min_tokens: the text does not end before. logprobs, prompt_logprobs:
    how many of the best tokens' log-probabilities to return at each place, None for none. skip_special_tokens: leave
    them out of the text. logit_bias: token id -> number added to its logit. logits_processors: called in order before a
    token is chosen, with the prompt's tokens, the text's so far, and the logits, a float32 array [V] to change in place
    or to replace by what is returned; an exception ends that request only.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else _listed("stop", self.stop)
        object.__setattr__(self, "stop", stops)
        object.__setattr__(self, "stop_token_ids", _listed("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        object.__setattr__(self, "logit_bias", self._biases())
        _whole("n", self.n, 1, MOST_SEQUENCES)
        _real("temperature", self.temperature, 0, 100)
        _real("top_p", self.top_p, 0, 1, open_low=True)
        _whole("top_k", self.top_k, 0, 1 << 31)
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 10)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            _whole("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 1 << 30)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens or 1 << 30)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, MOST_LOGPROBS)
        self._check_stops()
        object.__setattr__(self, "logits_processors", _listed("logits_processors", self.logits_processors))
        for i, processor in enumerate(self.logits_processors or ()):
            if not callable(processor):
                raise UsageError(f"logits_processors[{i}] is not callable", param="logits_processors")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            _yes_or_no(name, getattr(self, name))

    def _check_stops(self) -> None:
        assert isinstance(self.stop, tuple) and isinstance(self.stop_token_ids, tuple)
        if len(self.stop) > MOST_STOPS or not all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in self.stop):
            raise UsageError(f"stop must be up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters", param="stop")
        if len(self.stop_token_ids) > MOST_BIASES:
            raise UsageError(f"stop_token_ids may hold {MOST_BIASES} ids at most", param="stop_token_ids")
        for token in self.stop_token_ids:
            _whole("stop_token_ids", token, 0, 1 << 31)

    def _biases(self) -> dict[int, float]:
        if self.logit_bias is None:
            return {}
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MOST_BIASES:
            raise UsageError(f"logit_bias must map up to {MOST_BIASES} token ids to numbers", param="logit_bias")
        found = {}
        for key, value in self.logit_bias.items():
            token = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 20 else key
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= 1 << 31:
                raise UsageError(f"logit_bias: {shown(key)} is not a token id", param="logit_bias")
            _real("logit_bias", value, -100, 100)
            found[token] = float(value)
        return found

    def seed_or_drawn(self) -> int:
        """The seed; one that is drawn now where it is None."""
        return int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed

    @cached_property
    def greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature < 1e-5

    @cached_property
    def cuts(self) -> tuple[float, float, float]:
        """temperature, 0 for greedy ones, top_p and min_p."""
        return 0.0 if self.greedy else self.temperature, self.top_p, self.min_p

    @cached_property
    def changes_logits(self) -> bool:
        """Whether logits are altered before a token is chosen."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        return penalties or bool(self.logit_bias) or self.min_tokens > 0 or bool(self.logits_processors)

    def check_vocabulary(self, size: int) -> None:
        """Raise UsageError where a token id is not one of `size`."""
        assert isinstance(self.stop_token_ids, tuple) and isinstance(self.logit_bias, dict)
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            if wrong := [token for token in ids if token >= size]:
                raise UsageError(f"{name} holds {wrong[0]}, the vocabulary has {size} tokens", param=name)


def check_order(salt: Any, priority: Any, tenant: Any) -> None:
    """Raise UsageError for values that the scheduler could not use; found later, they would fail everybody's step."""
    if not isinstance(salt, bytes):
        raise UsageError(f"salt must be bytes, not {shown(salt)}", param="salt")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise UsageError(f"priority must be an integer, not {shown(priority)}", param="priority")
    if not isinstance(tenant, str | None):
        raise UsageError(f"tenant must be a text or None, not {shown(tenant)}", param="tenant")


DEFAULT_MODEL = "smollm2-135m-instruct"
# Number formats of weights, of pages and of adapters. bfloat16+inputs: the inputs of products are bfloat16, too.
DTYPES = ("auto", "float32", "float16", "bfloat16", "bfloat16+inputs", "int8", "int4")
ENGINE_DTYPES = ("auto", "float32", "float16", "int8")
NUMA_MODES = ("off", "interleave", "replicate")

# What to do instead of what vLLM has a parameter for.
_VLLM_HINTS = {
    "enable_lora": "LoRA is always on: leave it out.",
    "lora_modules": "Name adapters with lora={name: path}, on the command line with --lora NAME=PATH.",
    "speculative_config": "Guesses come from the text itself (ngram): set num_speculative_tokens, or 0 for none.",
}


def vllm_hint(name: str) -> str:
    """What to do instead of a parameter, or option, that vLLM has and minilora does not; empty for all others."""
    return _VLLM_HINTS.get(name.lstrip("-").replace("-", "_"), "")


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine. Raises UsageError for values that make no sense.

    max_model_len: tokens of prompt and text together, no more than the model's positions reach; None for what it
    was trained on. max_num_seqs: sequences that run at once; max_num_batched_tokens: rows of a step; max_step_ms:
    milliseconds that a step with prompts in it should take at most while texts decode, None for any.
    num_scheduler_steps: tokens that a step may give each text while all of them only decode, as far as they fit into
    20 ms. num_speculative_tokens: draft tokens per text and step, from what the text holds already, where that
    pays; the text is the same. kv_cache_dtype: "auto" is float32 for float32 weights, else float16. kv_cache_memory:
    bytes of KV pages, None for enough for max_num_seqs full-length texts, at most half of the free memory. block_size:
    tokens of a page. max_loras: adapters in use at once; max_cpu_loras: adapters in memory, None: 256, or max_loras if
    that is more; max_lora_rank: highest rank; lora_dtype: "auto" is float32 for float32 weights, else int8 with a scale
    for each row of A and B; lora_memory: bytes for adapters in memory, None for a quarter of the free memory. threads:
    None for all cores that the process may use. numa: what to do on machines with several memory nodes, see numa.py.
    enable_prefix_caching: keep pages of finished texts for others that begin alike. debug_checks: check all books after
    each step and fill freed pages with NaN; slow.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_step_ms: int | None = 100
    num_scheduler_steps: int = 8
    num_speculative_tokens: int = 8
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | None = None
    block_size: int = 32
    max_loras: int = 16
    max_cpu_loras: int | None = None
    max_lora_rank: int = HIGHEST_RANK
    lora_dtype: str = "auto"
    lora_memory: int | None = None
    threads: int | None = None
    numa: str = "off"
    enable_prefix_caching: bool = True
    debug_checks: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_num_seqs", 1, 4096),
            ("max_num_batched_tokens", 1, 1 << 20),
            ("num_scheduler_steps", 1, 1024),
            ("num_speculative_tokens", 0, 64),
            ("max_loras", 1, 4096),
            ("max_lora_rank", 1, HIGHEST_RANK),
            ("block_size", 32, 1024),
        ):
            _whole(name, getattr(self, name), low, high)
        for name, high in (
            ("max_model_len", 1 << 24),
            ("kv_cache_memory", 1 << 50),
            ("lora_memory", 1 << 50),
            ("threads", 1024),
            ("max_cpu_loras", 1 << 16),
            ("max_step_ms", 60_000),
        ):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, high)
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise UsageError(f"max_cpu_loras is {self.max_cpu_loras}, less than max_loras, {self.max_loras}")
        if self.block_size % 32:
            raise UsageError(f"block_size must be a multiple of 32, not {self.block_size}")
        for name, known in (("kv_cache_dtype", ENGINE_DTYPES), ("lora_dtype", ENGINE_DTYPES), ("numa", NUMA_MODES)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r} is not known", f"Known: {', '.join(known)}.")
        for name in ("enable_prefix_caching", "debug_checks"):
            _yes_or_no(name, getattr(self, name))
