"""What an engine can take: how long its texts get, and which requests could never run."""

from dataclasses import dataclass

from .errors import UsageError
from .params import MOST_LORAS, EngineConfig, SamplingParams, shown
from .sequence import AdapterUse


@dataclass(frozen=True)
class Bounds:
    """length: most tokens of a text, prompt and answer; vocabulary: number of tokens; pages: of the KV cache."""

    length: int
    vocabulary: int
    pages: int
    config: EngineConfig

    def final_length(self, prompt: int, params: SamplingParams) -> int:
        """Tokens that a text with a prompt of this many has at its end, unless something ends it earlier."""
        return self.length if params.max_tokens is None else min(prompt + params.max_tokens, self.length)

    def check(self, tokens: list[int], params: SamplingParams, uses: tuple[AdapterUse, ...]) -> None:
        """Raise UsageError for a request that could never run."""
        if not isinstance(params, SamplingParams):
            raise UsageError(f"sampling_params is {params!r}", "Write SamplingParams(...).", param="sampling_params")
        self._check_prompt(tokens, params)
        if params.n > self.config.max_num_seqs:
            raise UsageError(
                f"n is {params.n}, but max_num_seqs is {self.config.max_num_seqs}", "Raise max_num_seqs.", param="n"
            )
        if len(uses) > MOST_LORAS:
            raise UsageError(
                f"{len(uses)} adapters in one request, at most {MOST_LORAS} are possible",
                "Use fewer, or merge some into one adapter.",
            )
        if (different := len({use.adapter for use in uses})) > self.config.max_loras:
            raise UsageError(
                f"{different} different adapters in one request, but max_loras is {self.config.max_loras}",
                "Raise max_loras.",
            )
        params.check_vocabulary(self.vocabulary)

    def _check_prompt(self, tokens: list[int], params: SamplingParams) -> None:
        if not tokens:
            raise UsageError("the prompt is empty", "Give at least one token.")
        if wrong := [t for t in tokens if not 0 <= t < self.vocabulary]:
            raise UsageError(
                f"token id {shown(wrong[0])} is outside the vocabulary of {self.vocabulary} tokens",
                "Encode the prompt with this model's tokenizer.",
            )
        if len(tokens) >= self.length:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, the model takes {self.length - 1} at most",
                "Shorten it, or raise max_model_len if the model was trained for more.",
            )
        if self.final_length(len(tokens), params) > self.pages * self.config.block_size:
            raise UsageError(
                f"{len(tokens)} tokens and max_tokens do not fit into {self.pages} KV pages",
                "Lower max_tokens or raise kv_cache_memory.",
            )
