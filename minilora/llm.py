"""The Python interface for offline work: LLM, in the caller's thread."""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Listing
from typing import Any, Self

from .chat import Message, encode_chat
from .errors import RequestError, UsageError
from .llm_engine import LLMEngine, Lora, Prompt, Request, Settings, Source, as_loras
from .outputs import LoRARequest, RequestOutput
from .params import DEFAULT_MODEL, SamplingParams
from .plan import DEFAULT_GROUP
from .progress import Report, silent
from .stats import Stats


class LLM:
    """A model and an engine for it.

    model: a name from `minilora list`, a hub repo (org/name or org/name@revision), a folder or a .gguf file; dtype: see
    params.DTYPES; group_size: 16, 32, 64 or 128, for int8 and int4; lora: names -> adapters to load at the start;
    report: called with a line of text when something takes long; the rest are EngineConfig's fields.

    generate and chat take prompts and return when all texts are done; stream yields one prompt's texts as they grow;
    submit queues a prompt with a callback, and run, or step by step `step`, works the queue off.
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
        self.llm_engine = LLMEngine(model, dtype=dtype, group_size=group_size, lora=lora, report=report, **engine)
        self.model, self.tokenizer = self.llm_engine.model, self.llm_engine.tokenizer
        self.engine = self.llm_engine.engine

    # ------------------------------------------------------------ adapters

    def add_lora(
        self,
        name: str,
        source: Source,
        settings: Settings = None,
        weight: float = 1.0,
        load: bool = True,
        report: Report = silent,
    ) -> None:
        """Let a name stand for an adapter: a PEFT folder, a hub repo, a bundled one's name, an Adapter, or arrays under
        PEFT's tensor names with the content of adapter_config.json as settings.

        Requests under way keep the version that they began with. weight: share of the machine when adapters compete;
        load: read it now; else when a request wants it. Raises NotFoundError, DownloadError, AdapterError, FormatError,
        UnsupportedError, UsageError (as for a rank above max_lora_rank) or ResourceError, and then nothing has changed.
        """
        self.llm_engine.add_lora(name, source, settings, weight, load, report)

    def remove_lora(self, name: str, force: bool = False) -> None:
        """Forget an adapter. Its requests finish first, or with force end with an error.

        Raises NotFoundError, or UsageError while a step is being computed or another thread is in one.
        """
        self.llm_engine.remove_lora(name, force)

    @property
    def adapters(self) -> list[str]:
        """The names of the registered adapters."""
        return list(self.engine.adapters.names)

    # ------------------------------------------------------------ generation

    def generate(
        self,
        prompts: Prompt | Listing[Prompt],
        sampling_params: SamplingParams | Listing[SamplingParams] | None = None,
        lora_request: Lora | Listing[Lora] = None,
    ) -> list[RequestOutput]:
        """Texts for prompts, each a string or {"prompt_token_ids": [...]}; all share the engine's steps.

        sampling_params, lora_request: one for all prompts or a list of one for each; an entry of lora_request may
        itself be a list: several adapters at once, in that order. Raises UsageError where a prompt can't run, and
        RequestError, with all outputs in its `outputs`, where one failed.
        """
        listed = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = _each(sampling_params, len(listed), "sampling_params")
        loras = _each_lora(lora_request, len(listed))
        self.engine.check_idle()
        requests: list[Request] = []
        try:
            for prompt, p, lora in zip(listed, params, loras, strict=True):
                requests.append(self._submit(prompt, p, lora))
            while any(not request.finished for request in requests):
                self.step()
        finally:
            for request in requests:
                self.llm_engine.abort_request(request)
        return _unless_failed([request.output for request in requests])

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
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, lora_request: Lora = None
    ) -> Iterator[RequestOutput]:
        """What one prompt's texts grow by, step by step, as AsyncEngine.generate has it; the last one is `finished`.

        Leaving the iteration early (call `close` on a generator held in a variable) ends the request. Raises UsageError
        where it can't run, RequestError where it failed.
        """
        self.engine.check_idle()
        request = self._submit(prompt, sampling_params, as_loras(lora_request))
        try:
            while True:
                # Steps that others run meanwhile work on it too, maybe to its end.
                if not request.finished:
                    self.step()
                delta = request.delta()
                if delta.outputs or delta.finished:
                    yield delta
                if delta.finished:
                    break
        finally:
            self.llm_engine.abort_request(request)
        _unless_failed([request.output])

    # ------------------------------------------------------------ a queue with callbacks

    def submit(
        self,
        prompt: Prompt,
        callback: Callable[[Request], None] | None = None,
        sampling_params: SamplingParams | None = None,
        lora_request: Lora = None,
        priority: int = 0,
        tenant: str | None = None,
        salt: bytes = b"",
    ) -> Request:
        """Queue a prompt; `step` and `run` work on it.

        callback: called with the request after each step that changed it; `request.output` holds the texts so far,
        `request.delta()` what is new, `request.finished` says whether it was the last call. An exception in it ends
        that request only, and is its `output.error`. priority, tenant, salt: as AsyncEngine.generate has them.
        """
        order = {"priority": priority, "tenant": tenant, "salt": salt}
        return self._submit(prompt, sampling_params, as_loras(lora_request), callback, **order)

    def cancel(self, request: Request) -> None:
        """End a request; what it held is free at once."""
        self.llm_engine.abort_request(request)

    def step(self) -> list[Request]:
        """A token or more for every running text; returns the requests that changed.

        Blocks while every request waits for its adapter to be read.
        """
        changed = self.llm_engine.step()
        if not changed and self.engine.busy:
            self.engine.wait()
        return changed

    def run(self) -> None:
        """Step until nothing is left."""
        while self.llm_engine.busy:
            self.step()

    def stats(self) -> Stats:
        """What the engine has done so far."""
        return self.engine.stats()

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        loras: tuple[LoRARequest, ...],
        callback: Callable[[Request], None] | None = None,
        **order: Any,
    ) -> Request:
        text, tokens = self.llm_engine.encode(prompt)
        params = SamplingParams() if params is None else params
        return self.llm_engine.add_request(text, tokens, params, loras, callback, **order)

    def close(self) -> None:
        """End the engine's threads; leaving `with LLM(...) as llm:` does so too."""
        self.llm_engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _each(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise UsageError(f"{len(value)} {name} for {count} prompts", "Give one for all, or a list of one for each.")
    return list(value)


def _each_lora(value: Any, count: int) -> list[tuple[LoRARequest, ...]]:
    if not isinstance(value, list | tuple):
        return [as_loras(value)] * count
    if len(value) == count:
        return [as_loras(entry) for entry in value]
    raise UsageError(
        f"{len(value)} entries of lora_request for {count} prompts",
        "Give one for each prompt; several adapters for one prompt are a list within that list.",
    )


def _unless_failed(outputs: list[RequestOutput]) -> list[RequestOutput]:
    failed = [output for output in outputs if output.error is not None]
    if failed:
        cause = f"{len(failed)} of {len(outputs)} requests failed, the first: {failed[0].error}"
        raise RequestError(cause, outputs=outputs) from failed[0].error
    return outputs
