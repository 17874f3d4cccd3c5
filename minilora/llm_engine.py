"""Requests as texts over the engine of token ids: prompts in, RequestOutputs that grow with each step out.

LLM drives it in the caller's thread, AsyncEngine in a thread of its own.
"""

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from .adapters import Adapter
from .checkpoint.resolve import resolve_adapter, resolve_model
from .engine import Engine
from .errors import UsageError, did_you_mean
from .loading import load_model
from .outputs import CompletionOutput, LogprobsAt, LoRARequest, RequestOutput, TextBuilder, logprobs_at
from .params import DEFAULT_MODEL, EngineConfig, SamplingParams, shown, vllm_hint
from .peft import adapter_from_arrays
from .plan import DEFAULT_GROUP, Target
from .progress import Report, silent
from .registry import AdapterVersion, Loaded
from .sequence import AdapterUse
from .step_results import Output

# Larger scales would overflow float32.
LARGEST_SCALE = 1e6

Prompt = str | Mapping[str, Any]
Lora = LoRARequest | Listing[LoRARequest] | None
Source = str | os.PathLike[str] | Adapter | Mapping[str, np.ndarray]
Settings = Mapping[str, Any] | None


class Request:
    """A prompt under way. output: everything so far; callback: called with the request after steps that changed it."""

    def __init__(
        self, output: RequestOutput, builders: list[TextBuilder], callback: Callable[["Request"], None] | None
    ):
        self.output, self.builders, self.callback = output, builders, callback
        # Those known so far; output.prompt_logprobs waits for all of them. None for the first token.
        self.prompt_logprobs: list[LogprobsAt | None] = [None]

    @property
    def finished(self) -> bool:
        """Whether all texts have ended."""
        return self.output.finished

    @property
    def started(self) -> bool:
        """Whether any of its texts has left the queue, if only to be preempted or to end later."""
        return self.finished or any(builder.sequence.times.started is not None for builder in self.builders)

    def delta(self) -> RequestOutput:
        """What is new since the last call, in an object of its own: safe to hand to another thread."""
        output = self.output
        return RequestOutput(
            output.request_id,
            output.prompt,
            output.prompt_token_ids,
            [found for builder in self.builders if (found := builder.delta())],
            output.finished,
            output.prompt_logprobs,
            output.lora_request,
            output.num_cached_tokens,
            output.error,
        )


class LLMEngine:
    """A model, an engine for it, and the requests under way. All calls from one thread unless they say otherwise.

    model: a name from `minilora list`, a hub repo (org/name or org/name@revision), a folder or a .gguf file; dtype: see
    params.DTYPES; group_size: 16, 32, 64 or 128, for int8 and int4; lora: names -> adapters to load at the start;
    report: called with a line of text when something takes long; the rest are EngineConfig's fields.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: str = "auto",
        group_size: int = DEFAULT_GROUP,
        lora: Mapping[str, Source] | None = None,
        report: Report = silent,
        **engine: Any,
    ):
        known = {f.name for f in fields(EngineConfig)}
        if unknown := sorted(engine.keys() - known):
            raise UsageError(
                f"the engine has no parameter {unknown[0]!r}", vllm_hint(unknown[0]) or did_you_mean(unknown[0], known)
            )
        config, target = EngineConfig(**engine), Target(dtype, group_size)
        self.model = load_model(resolve_model(model, report), model, target, report)
        self.tokenizer = self.model.tokenizer
        self.engine = Engine(self.model.weights, config, self.model.eos)
        self._sources: dict[str, str] = {}
        # Of each sequence under way, by number.
        self._under_way: dict[int, tuple[Request, TextBuilder]] = {}
        # Those that wait for log-probabilities of their prompts.
        self._asking: dict[Request, None] = {}
        self._number = 0
        try:
            for name, path in (lora or {}).items():
                self.add_lora(name, path, report=report)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ adapters

    def find_adapter(self, source: Source, settings: Settings = None, report: Report = silent) -> Path | Adapter:
        """A PEFT folder, a hub repo (fetched now) or a bundled adapter's name as a path; arrays as an Adapter.

        settings: with arrays, under PEFT's tensor names, the content of adapter_config.json. From any thread.
        """
        if isinstance(source, str | os.PathLike):
            return resolve_adapter(os.fspath(source), report)
        if isinstance(source, Adapter):
            return source
        if settings is None:
            raise UsageError(
                "an adapter of arrays lacks the content of adapter_config.json",
                "Give it as settings, with r and lora_alpha at least.",
            )
        return adapter_from_arrays(source, settings, self.model.weights.config)

    def add_lora(
        self,
        name: str,
        source: Source,
        settings: Settings = None,
        weight: float = 1.0,
        load: bool = True,
        report: Report = silent,
    ) -> None:
        """Let a name stand for an adapter; see LLM.add_lora."""
        found = self.find_adapter(source, settings, report)
        self.register(name, source, found, weight, self.engine.adapters.read(found) if load else None)

    def register(
        self, name: str, source: Source, found: Path | Adapter, weight: float = 1.0, loaded: Loaded | None = None
    ) -> AdapterVersion:
        """Let a name stand for an adapter that `find_adapter` found, and the registry may have read already."""
        version = self.engine.adapters.add(name, found, weight, loaded)
        self._sources.pop(name, None)
        if isinstance(source, str | os.PathLike):
            self._sources[name] = os.fspath(source)
        return version

    def remove_lora(self, name: str, force: bool = False) -> None:
        """Forget an adapter; see Engine.remove_adapter."""
        self.engine.remove_adapter(name, force)
        self._sources.pop(name, None)

    def knows(self, lora: LoRARequest) -> bool:
        """Whether its name stands for its path already. Without a path: True, or NotFoundError for an unknown name."""
        if lora.lora_path is None:
            self.engine.adapters.get(lora.lora_name)
            return True
        return self._sources.get(lora.lora_name) == lora.lora_path

    def _use(self, lora: LoRARequest) -> AdapterUse:
        if not self.knows(lora) and lora.lora_path is not None:
            self.register(lora.lora_name, lora.lora_path, self.find_adapter(lora.lora_path))
        return AdapterUse(self.engine.adapters.get(lora.lora_name), _as_scale(lora.scale))

    # ------------------------------------------------------------ requests

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text, token ids) of a prompt. May be called from any thread. Raises UsageError."""
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        ids = token_ids(prompt)
        return prompt.get("prompt"), ids

    def add_request(
        self,
        prompt: str | None,
        tokens: list[int],
        params: SamplingParams,
        loras: tuple[LoRARequest, ...] = (),
        callback: Callable[[Request], None] | None = None,
        request_id: str | None = None,
        **order: Any,
    ) -> Request:
        """Queue a prompt. order: Engine.submit's salt, priority and tenant. Raises UsageError or NotFoundError."""
        sequences = self.engine.submit(tokens, params, tuple(self._use(lora) for lora in loras), **order)
        builders = [TextBuilder(sequence, i, self.tokenizer) for i, sequence in enumerate(sequences)]
        self._number += 1
        texts: list[CompletionOutput] = [builder.output for builder in builders]
        output = RequestOutput(request_id or str(self._number), prompt, tokens, texts, lora_request=loras)
        request = Request(output, builders, callback)
        for builder in builders:
            self._under_way[builder.sequence.number] = request, builder
        if params.prompt_logprobs is not None:
            self._asking[request] = None
        return request

    def abort_request(self, request: Request, reason: str = "abort") -> None:
        """End a request; what it held is free at once. Does nothing where it is finished."""
        for builder in request.builders:
            self.engine.cancel(builder.sequence, reason)
            self._forget(request, builder)

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        return bool(self._under_way) or self.engine.busy

    def step(self) -> list[Request]:
        """A token or more for every running text; returns the requests that changed, after their callbacks.

        An exception in a callback, or in making a request's text, ends that request only.
        """
        changed: dict[Request, None] = {}

        def take(output: Output) -> None:
            if found := self._under_way.get(output.sequence.number):
                request, builder = found
                try:
                    self._take(request, builder, output)
                except Exception as error:
                    self._fail(request, error)
                changed[request] = None

        try:
            self.engine.step(take)
        finally:
            # After Ctrl-C too: what was taken counts.
            self._note_prompts()
            for request in changed:
                self._call_back(request)
        return list(changed)

    def _take(self, request: Request, builder: TextBuilder, output: Output) -> None:
        sequence = output.sequence
        stopped = output.token is not None and builder.add(output.token, output.logprobs, output.last)
        if builder is request.builders[0] and len(builder.output.token_ids) == 1:
            self._show_prompt(request)
        if stopped:
            self.engine.cancel(sequence, "stop")
        if stopped or output.last or output.token is None:
            self._forget(request, builder)

    def _forget(self, request: Request, builder: TextBuilder) -> None:
        if self._under_way.pop(builder.sequence.number, None) is None:
            return
        builder.finish()
        if builder is request.builders[0]:
            self._asking.pop(request, None)
        output = request.output
        output.error = output.error or builder.sequence.error
        if all(b.output.finish_reason is not None for b in request.builders):
            output.finished = True

    def _note_prompts(self) -> None:
        """Turn what was computed of prompts into log-probabilities by id, step by step: a long one takes a second."""
        for request in self._asking:
            self._note_prompt(request)

    def _note_prompt(self, request: Request) -> None:
        new = request.builders[0].sequence.prompt_logprobs[len(request.prompt_logprobs) - 1 :]
        request.prompt_logprobs += [logprobs_at(found, self.tokenizer) for found in new]

    def _show_prompt(self, request: Request) -> None:
        """What is known of the prompt, once the first token is there."""
        request.output.num_cached_tokens = request.builders[0].sequence.cached
        if request in self._asking:
            self._note_prompt(request)
            request.output.prompt_logprobs = request.prompt_logprobs
            del self._asking[request]

    def _call_back(self, request: Request) -> None:
        if (callback := request.callback) is None:
            return
        if request.finished:
            # Before the call: within it, there may be other steps, and more calls.
            request.callback = None
        try:
            callback(request)
        except Exception as error:
            request.callback = None
            self._fail(request, error)

    def _fail(self, request: Request, error: Exception) -> None:
        request.output.error = error
        self.abort_request(request, "error")

    def close(self) -> None:
        """End the engine's threads."""
        self.engine.close()


def as_loras(value: Lora) -> tuple[LoRARequest, ...]:
    """The adapters of one request as a tuple. Raises UsageError."""
    found = value if isinstance(value, list | tuple) else () if value is None else (value,)
    if wrong := [entry for entry in found if not isinstance(entry, LoRARequest)]:
        raise UsageError(f"lora_request holds {wrong[0]!r}, not a LoRARequest", "Write LoRARequest(NAME).")
    return tuple(found)


def _as_scale(value: Any) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_SCALE
    if not good:
        raise UsageError(
            f"an adapter's scale must be a number from -{LARGEST_SCALE:g} to {LARGEST_SCALE:g}, not {value!r}"
        )
    return float(value)


def token_ids(prompt: Mapping[str, Any]) -> list[int]:
    """The ids of a prompt given as {"prompt_token_ids": [...]}. Raises UsageError."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
    if not isinstance(ids, list | tuple) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UsageError(f'a prompt must be a text or {{"prompt_token_ids": [...]}}, not {shown(prompt)}')
    return list(ids)
