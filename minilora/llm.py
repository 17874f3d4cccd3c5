"""The Python interface: LLM for work offline."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import fields
from typing import Any

from .adapters import Adapter, load_adapter
from .chat import Message, encode_chat
from .checkpoint.lock import resolve_adapter, resolve_model
from .engine import Engine
from .errors import NotFoundError, UsageError, did_you_mean
from .outputs import LogprobsAt, LoRARequest, RequestOutput, TextBuilder, logprobs_at
from .packed import Report, load_model, silent
from .params import EngineConfig, SamplingParams
from .sequence import AdapterUse
from .weights import DEFAULT_GROUP, Target

DEFAULT_MODEL = "smollm2-135m-instruct"

Prompt = str | Mapping[str, Any]
Lora = LoRARequest | Listing[LoRARequest] | None


class _Request:
    """A prompt on its way: its sequences and their texts."""

    def __init__(
        self,
        number: int,
        prompt: str | None,
        tokens: list[int],
        builders: list[TextBuilder],
        loras: tuple[LoRARequest, ...],
    ):
        self.builders = builders
        self.output = RequestOutput(str(number), prompt, tokens, [b.output for b in builders], lora_request=loras)


class LLM:
    """A model and an engine for it.

    model: a name in models.lock, a hub repo (org/name or org/name@revision), a folder or a .gguf file; dtype: see
    weights.DTYPES; group_size: 32, 64 or 128, for int8 and int4; lora: names -> adapters to load at once; report:
    called with a line of text when something takes long; the rest are EngineConfig's fields.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: str = "auto",
        group_size: int = DEFAULT_GROUP,
        lora: Mapping[str, str] | None = None,
        report: Report = silent,
        **engine: Any,
    ):
        known = {f.name for f in fields(EngineConfig)}
        if unknown := sorted(engine.keys() - known):
            raise UsageError(f"LLM has no parameter {unknown[0]!r}", did_you_mean(unknown[0], known))
        config, target = EngineConfig(**engine), Target(dtype, group_size)
        self.model = load_model(resolve_model(model, report), model, target, report)
        self.tokenizer = self.model.tokenizer
        self.engine = Engine(self.model.weights, config, self.model.eos)
        self.adapters: dict[str, str] = {}
        self._paths: dict[str, str] = {}
        self._requests: dict[int, _Request] = {}
        self._number = 0
        for name, path in (lora or {}).items():
            self.add_lora(name, path, report)

    # ------------------------------------------------------------ adapters

    def add_lora(self, name: str, source: str | Adapter, report: Report = silent) -> None:
        """Load an adapter under a name: a PEFT folder, a hub repo, a bundled one's name, or an Adapter.

        Raises NotFoundError, AdapterError, FormatError or UnsupportedError.
        """
        if isinstance(source, Adapter):
            adapter = source
        else:
            adapter = load_adapter(resolve_adapter(source, report), self.model.weights.config, self.model.weights)
            self._paths[name] = source
        self.adapters[name] = self.engine.add_adapter(adapter)

    def _use(self, lora: LoRARequest) -> AdapterUse:
        if lora.lora_path is not None and self._paths.get(lora.lora_name) != lora.lora_path:
            self.add_lora(lora.lora_name, lora.lora_path)
        if lora.lora_name not in self.adapters:
            raise NotFoundError(f"no adapter is called {lora.lora_name!r}", did_you_mean(lora.lora_name, self.adapters))
        return AdapterUse(self.adapters[lora.lora_name], float(lora.scale))

    # ------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Prompt | Listing[Prompt],
        sampling_params: SamplingParams | Listing[SamplingParams] | None = None,
        lora_request: Lora | Listing[Lora] = None,
    ) -> list[RequestOutput]:
        """Texts for prompts, each a string or {"prompt_token_ids": [...]}; all share the engine's steps.

        sampling_params, lora_request: one for all prompts or a list of one for each; an entry of lora_request may
        itself be a list: several adapters at once, in that order.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._each(
            sampling_params if sampling_params is not None else SamplingParams(), len(listed), "sampling_params"
        )
        loras = self._each_lora(lora_request, len(listed))
        requests = [self._submit(prompt, p, lora) for prompt, p, lora in zip(listed, params, loras, strict=True)]
        try:
            while any(not request.output.finished for request in requests):
                self._step()
        finally:
            for request in requests:
                self._drop(request)
        return [request.output for request in requests]

    def chat(
        self,
        messages: Listing[Message] | Listing[Listing[Message]],
        sampling_params: SamplingParams | None = None,
        lora_request: Lora | Listing[Lora] = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation, or to each of a list of them, through the model's chat template."""
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [{"prompt_token_ids": encode_chat(self.tokenizer, conversation)} for conversation in conversations]
        return self.generate(prompts, sampling_params, lora_request)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams, lora_request: Lora = None
    ) -> Iterator[tuple[int, str]]:
        """(index, new text) of one prompt's texts as they grow; ends when all are finished."""
        request = self._submit(prompt, sampling_params, _as_loras(lora_request))
        try:
            while not request.output.finished:
                self._step()
                for builder in request.builders:
                    if text := builder.fresh():
                        yield builder.output.index, text
        finally:
            self._drop(request)

    def _each(self, value: Any, count: int, name: str) -> list[Any]:
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            raise UsageError(f"{len(value)} {name} for {count} prompts")
        return list(value)

    def _each_lora(self, value: Any, count: int) -> list[tuple[LoRARequest, ...]]:
        if value is None or isinstance(value, LoRARequest):
            return [_as_loras(value)] * count
        if len(value) == count:
            return [_as_loras(entry) for entry in value]
        raise UsageError(f"{len(value)} lora_requests for {count} prompts")

    def _submit(self, prompt: Prompt, params: SamplingParams, loras: tuple[LoRARequest, ...]) -> _Request:
        text = prompt if isinstance(prompt, str) else prompt.get("prompt")
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = token_ids(prompt)
        sequences = self.engine.submit(tokens, params, tuple(self._use(lora) for lora in loras))
        builders = [TextBuilder(sequence, i, self.tokenizer) for i, sequence in enumerate(sequences)]
        self._number += 1
        request = _Request(self._number, text, tokens, builders, loras)
        for sequence in sequences:
            self._requests[sequence.number] = request
        return request

    def _step(self) -> None:
        for sequence, token, logprobs in self.engine.step():
            request = self._requests[sequence.number]
            builder = next(b for b in request.builders if b.sequence is sequence)
            if builder.add(token, logprobs) and sequence.finish_reason != "stop":
                self.engine.cancel(sequence, "stop")
                sequence.finish_reason = "stop"
            if sequence.finish_reason is not None:
                builder.finish()
                self._finish(request)

    def _finish(self, request: _Request) -> None:
        first = request.builders[0].sequence
        if any(b.output.finish_reason is None for b in request.builders):
            return
        request.output.finished = True
        request.output.num_cached_tokens = first.cached
        if first.params.prompt_logprobs is not None:
            request.output.prompt_logprobs = self._prompt_logprobs(request)

    def _prompt_logprobs(self, request: _Request) -> list[LogprobsAt | None]:
        return [None, *(logprobs_at(found, self.tokenizer) for found in request.builders[0].sequence.prompt_logprobs)]

    def _drop(self, request: _Request) -> None:
        for builder in request.builders:
            self.engine.cancel(builder.sequence)
            self._requests.pop(builder.sequence.number, None)

    def close(self) -> None:
        """End the engine's threads."""
        self.engine.close()


def _as_loras(value: Lora) -> tuple[LoRARequest, ...]:
    if value is None:
        return ()
    found = (value,) if isinstance(value, LoRARequest) else tuple(value)
    if not all(isinstance(entry, LoRARequest) for entry in found):
        raise UsageError("lora_request must hold LoRARequests")
    return found


def token_ids(prompt: Mapping[str, Any]) -> list[int]:
    """The ids of a prompt given as {"prompt_token_ids": [...]}. Raises UsageError."""
    ids = prompt.get("prompt_token_ids")
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UsageError('a prompt must be a text or {"prompt_token_ids": [...]}')
    return list(ids)
