"""The NumPy backend: the reference network behind the same interface, one text at a time. Slow, made to be read."""

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from typing import Any

import numpy as np

from minilora_kernels import reference as kernels

from .adapters import Adapter
from .batch import Draw
from .checkpoint.resolve import resolve_adapter, resolve_model
from .errors import UsageError
from .llm_engine import token_ids
from .loading import load_model
from .outputs import LoRARequest, RequestOutput, TextBuilder
from .params import SamplingParams
from .peft import load_adapter
from .plan import DEFAULT_GROUP, Target
from .progress import Report, silent
from .reference import Reference
from .sampler import alter
from .sequence import Sequence


class PlainLLM:
    """LLM's generate with NumPy alone: every token computes the whole text again."""

    def __init__(self, model: str, *, dtype: str = "auto", group_size: int = DEFAULT_GROUP, report: Report = silent):
        self.model = load_model(resolve_model(model, report), model, Target(dtype, group_size), report)
        self.tokenizer = self.model.tokenizer
        self.adapters: dict[str, Adapter] = {}
        self._floats = self.model.weights.floats()

    def add_lora(self, name: str, source: str, report: Report = silent) -> None:
        """Load an adapter under a name."""
        self.adapters[name] = load_adapter(
            resolve_adapter(source, report), self.model.weights.config, self.model.weights
        )

    def generate(
        self, prompts: Listing[Mapping[str, Any]], params: SamplingParams, loras: Listing[Listing[LoRARequest]]
    ) -> list[RequestOutput]:
        """One text for each prompt of token ids, with its adapters; no log-probabilities. Raises UsageError."""
        return [self._generate(token_ids(p), params, chosen) for p, chosen in zip(prompts, loras, strict=True)]

    def _generate(self, tokens: list[int], params: SamplingParams, loras: Listing[LoRARequest]) -> RequestOutput:
        config = self.model.weights.config
        longest = config.max_position_embeddings
        if len(tokens) >= longest:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens, the model takes {longest - 1} at most", "Shorten it."
            )
        network = Reference(config, self._merged(loras), longest)
        sequence = Sequence(1, list(tokens), len(tokens), params, params.seed_or_drawn())
        builder = TextBuilder(sequence, 0, self.tokenizer)
        most = longest if params.max_tokens is None else min(len(tokens) + params.max_tokens, longest)
        while sequence.finish_reason is None:
            token = self._choose(network.forward(sequence.tokens)[-1], sequence)
            sequence.finish_reason = sequence.append(token, self.model.eos, most)
            if builder.add(token, None, sequence.finish_reason is not None):
                sequence.finish_reason = "stop"
        builder.finish()
        return RequestOutput("1", None, tokens, [builder.output], finished=True, lora_request=tuple(loras))

    def _merged(self, loras: Listing[LoRARequest]) -> dict[str, np.ndarray]:
        """The weights with every adapter's B A added."""
        merged = dict(self._floats)
        for lora in loras:
            for module, (a, b) in self.adapters[lora.lora_name].pairs.items():
                update = (b @ a).T if module == "model.embed_tokens" else b @ a
                merged[f"{module}.weight"] = merged[f"{module}.weight"] + np.float32(lora.scale) * update
        return merged

    def _choose(self, logits: np.ndarray, sequence: Sequence) -> int:
        params, cut = sequence.params, sequence.prompt_length
        barred = (*self.model.eos, *(params.stop_token_ids or ()))
        draw = Draw(
            0, params, sequence.seed, len(sequence.tokens), sequence.tokens[:cut], sequence.tokens[cut:], barred
        )
        logits = logits.astype(np.float32)
        alter(logits, draw)
        if params.greedy:
            return kernels.argmax(logits, 0, len(logits))
        number = kernels.uniform(sequence.seed & (1 << 64) - 1, draw.position)
        cuts = (params.temperature, params.top_k, params.top_p, params.min_p)
        return kernels.sample(logits, 0, len(logits), *cuts, number, None, None, 0)
