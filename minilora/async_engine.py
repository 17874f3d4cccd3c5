"""AsyncEngine: the engine in a thread of its own, for asyncio programs such as servers.

The thread alone touches the engine. Coroutines send it orders through a queue and get their tokens in batches, one
wake-up of the event loop for each step.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from .adapters import Adapter
from .chat import Message, encode_chat
from .errors import EngineClosedError, EngineDeadError, QueueTimeoutError, RequestError
from .llm_engine import LLMEngine, Lora, Prompt, Request, Settings, Source, as_loras
from .outputs import CompletionOutput, LoRARequest, RequestOutput
from .params import DEFAULT_MODEL, EngineConfig, SamplingParams
from .registry import Loaded
from .stats import Stats

Answer = TypeVar("Answer")


class _Stream:
    """Carries one request's outputs from the engine's thread to a coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self.request: Request | None = None
        self.timer: asyncio.TimerHandle | None = None


class AsyncEngine:
    """A model served to coroutines. Parameters are LLM's; model and adapters are loaded here, before the thread starts.

    max_model_len: tokens that prompt and text may have together; kv_tokens: tokens that all pages hold.

    Any number of coroutines, of any event loops, may call all methods at the same time. After `close`, and after an
    error of the engine itself, they raise EngineDeadError.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any):
        self._llm = LLMEngine(model, **options)
        self.tokenizer, self.model = self._llm.tokenizer, self._llm.model
        self.max_model_len = self._llm.engine.length
        self.kv_tokens = self._llm.engine.pool.pages * self._llm.engine.config.block_size
        self._orders: deque[tuple[Callable[[], Any], Future]] = deque()
        self._wake = threading.Event()
        self._llm.engine.adapters.loader.wake = self._wake.set
        self._streams: dict[Request, _Stream] = {}
        self._death: EngineDeadError | None = None
        self._closing = False
        # When the thread began what it is doing, None while it waits for work.
        self._began: float | None = None
        self._lock = threading.Lock()
        # One adapter at a time: while it is read it takes several times its size.
        self._reader = ThreadPoolExecutor(1, "minilora-reader")
        self._thread = threading.Thread(target=self._work, name="minilora-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora_request: Lora = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
        salt: bytes = b"",
        start_within: float | None = None,
        together: list[Request] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """What a prompt's texts grow by, step by step; the last one is `finished`.

        Leaving the iteration early (call `aclose` on a generator held in a variable), or cancelling the task, ends the
        request.

        priority: lower ones go first; tenant: who shares fairly with others, None for the adapter; salt: cached
        prefixes are shared within one salt only; start_within: seconds within which a request must start; together: an
        empty list that several calls share: once one of their requests has started, start_within ends none of them.

        Raises UsageError and NotFoundError on the first iteration, QueueTimeoutError after start_within, RequestError
        where the request fails, EngineDeadError where the engine has stopped.
        """
        loras = as_loras(lora_request)
        text, tokens = await asyncio.to_thread(self._llm.encode, prompt)
        await self._register_paths(loras)
        stream, group = _Stream(asyncio.get_running_loop()), [] if together is None else together
        if start_within is not None:
            expire = partial(self._expire, stream, group, start_within)
            stream.timer = stream.loop.call_later(start_within, self._post, expire)
        params = SamplingParams() if sampling_params is None else sampling_params
        order = {"priority": priority, "tenant": tenant, "salt": salt}

        def submit() -> None:
            stream.request = self._llm.add_request(text, tokens, params, loras, None, request_id, **order)
            self._streams[stream.request] = stream
            group.append(stream.request)

        submitted = self._order(submit)
        try:
            await asyncio.wrap_future(submitted)
            while True:
                output = await stream.queue.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finished:
                    return
        finally:
            if stream.timer is not None:
                stream.timer.cancel()
            # The order to abort comes after the one to submit, whether that was carried out yet or not.
            self._post(lambda: self._abort(stream))

    async def complete(self, prompt: Prompt, *args: Any, **options: Any) -> RequestOutput:
        """The whole answer to a prompt. Parameters and errors are generate's."""
        whole: RequestOutput | None = None
        async for delta in self.generate(prompt, *args, **options):
            whole = delta if whole is None else _join(whole, delta)
        if whole is None:
            raise RequestError("the request ended without an output")
        whole.outputs.sort(key=lambda output: output.index)
        return whole

    async def chat(self, messages: list[Message], *args: Any, **options: Any) -> RequestOutput:
        """The answer to a conversation, through the model's chat template. Parameters and errors are generate's."""
        ids = await asyncio.to_thread(encode_chat, self.tokenizer, messages)
        return await self.complete({"prompt_token_ids": ids}, *args, **options)

    async def _register_paths(self, loras: tuple[LoRARequest, ...]) -> None:
        """Adapters that are named by a path for the first time; finding them may fetch them from a hub."""
        for lora in loras:
            # One without a path is known or not: submitting finds out, without waiting for another step.
            if lora.lora_path is not None and not await self._ask(partial(self._llm.knows, lora)):
                await self.add_lora(lora.lora_name, lora.lora_path or "", load=False)

    def _abort(self, stream: _Stream) -> None:
        if stream.request is not None:
            self._streams.pop(stream.request, None)
            self._llm.abort_request(stream.request)

    def _expire(self, stream: _Stream, group: list[Request], start_within: float) -> None:
        if stream.request in self._streams and not any(request.started for request in group):
            self._abort(stream)
            error = QueueTimeoutError(
                f"the request did not start within {start_within:g} s",
                "Raise start_within (--queue-timeout) or max_num_seqs, or send fewer requests.",
            )
            _call(stream.loop, [(stream, error)])

    # ------------------------------------------------------------ adapters and state

    async def add_lora(
        self, name: str, source: Source, settings: Settings = None, weight: float = 1.0, load: bool = True
    ) -> None:
        """LLM.add_lora; finding and reading the adapter holds nobody up."""
        found = await asyncio.to_thread(self._llm.find_adapter, source, settings)
        loaded = await self._read(found) if load else None
        await self._ask(lambda: self._llm.register(name, source, found, weight, loaded))

    async def _read(self, found: Path | Adapter) -> Loaded:
        try:
            reading = self._reader.submit(self._llm.engine.adapters.read, found)
        except RuntimeError:
            raise EngineClosedError("the engine was closed") from None
        return await asyncio.wrap_future(reading)

    async def remove_lora(self, name: str, force: bool = False) -> None:
        """LLM.remove_lora."""
        await self._ask(lambda: self._llm.remove_lora(name, force))

    async def adapters(self) -> list[str]:
        """The names of the registered adapters."""
        return await self._ask(lambda: list(self._llm.engine.adapters.names))

    async def warm_up(self) -> None:
        """Compile what the first requests would have to wait for; to be called before them."""
        await self._ask(self._llm.engine.warm_up)

    async def reset_prefix_cache(self) -> None:
        """Forget what was kept of finished texts."""
        await self._ask(self._llm.engine.reset_prefix_cache)

    async def stats(self) -> Stats:
        """What the engine has done so far."""
        return await self._ask(self._llm.engine.stats)

    async def check_integrity(self) -> None:
        """Raise AssertionError where the books of pages, adapters or requests are wrong."""
        await self._ask(self._llm.engine.check_integrity)

    @property
    def dead(self) -> EngineDeadError | None:
        """Why the engine takes no more requests; None while it does."""
        return self._death

    @property
    def config(self) -> EngineConfig:
        """The sizes that the engine was made with."""
        return self._llm.engine.config

    @property
    def stuck_for(self) -> float:
        """Seconds since the thread began its present step; 0.0 while it waits for work."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """End the threads, once an adapter being read is done; requests under way end with EngineClosedError.

        Leaving `async with AsyncEngine(...) as engine:` does so too.
        """
        self._closing = True
        self._wake.set()
        elsewhere = threading.current_thread() is not self._thread
        self._reader.shutdown(wait=elsewhere)
        if elsewhere:
            self._thread.join()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # ------------------------------------------------------------ orders

    def _order(self, act: Callable[[], Answer]) -> "Future[Answer]":
        """Have something done between two steps. Raises EngineDeadError."""
        future: Future[Answer] = Future()
        with self._lock:
            if self._death is not None:
                raise self._death.copy()
            self._orders.append((act, future))
        self._wake.set()
        return future

    def _post(self, act: Callable[[], None]) -> None:
        """An order that nobody waits for; of no use to a dead engine."""
        if self._death is None:
            try:
                self._order(act)
            except EngineDeadError:
                return

    async def _ask(self, act: Callable[[], Answer]) -> Answer:
        return await asyncio.wrap_future(self._order(act))

    # ------------------------------------------------------------ the engine's thread

    def _work(self) -> None:
        try:
            while True:
                # Cleared before looking for work: what is set from here on wakes the thread again.
                self._wake.clear()
                if self._closing:
                    break
                self._began = time.monotonic()
                self._carry_out()
                if self._llm.busy:
                    self._deliver(self._llm.step())
                if not self._llm.busy or (self._llm.engine.stalled and self._llm.engine.adapters.loading):
                    self._began = None
                    self._wake.wait()
            self._die(EngineClosedError("the engine was closed"))
        except BaseException as error:
            death = EngineDeadError(f"the engine stopped on an error: {error!r}", "Restart it, and report this error.")
            death.__cause__ = error
            self._die(death)
        finally:
            self._llm.close()

    def _carry_out(self) -> None:
        while self._orders:
            act, future = self._orders.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(act())
                except Exception as error:
                    future.set_exception(error)

    def _deliver(self, changed: list[Request]) -> None:
        """Hand each request's news to its event loop, all of a step at once."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | Exception]]] = {}
        for request in changed:
            stream = self._streams.get(request)
            if stream is None:
                continue
            delta = request.delta()
            news = batches.setdefault(stream.loop, [])
            if delta.outputs or delta.finished:
                news.append((stream, _as_error(delta) or delta))
            if delta.finished:
                del self._streams[request]
        for loop, news in batches.items():
            _call(loop, news)

    def _die(self, death: EngineDeadError) -> None:
        with self._lock:
            self._death = death
            orders, self._orders = list(self._orders), deque()
        for _, future in orders:
            if future.set_running_or_notify_cancel():
                future.set_exception(death.copy())
        for stream in self._streams.values():
            _call(stream.loop, [(stream, death.copy())])
        self._streams.clear()


def _call(loop: asyncio.AbstractEventLoop, news: list[tuple[_Stream, RequestOutput | Exception]]) -> None:
    """Put news into their queues, in the loop's thread."""

    def put() -> None:
        for stream, output in news:
            stream.queue.put_nowait(output)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        # The loop is closed: nobody is left to be told.
        return


def _as_error(delta: RequestOutput) -> Exception | None:
    if delta.error is None:
        return None
    error = RequestError(f"the request failed: {delta.error}")
    error.__cause__ = delta.error
    return error


def _join(whole: RequestOutput, delta: RequestOutput) -> RequestOutput:
    """`whole`, grown by `delta`."""
    by_index = {output.index: output for output in whole.outputs}
    for new in delta.outputs:
        old = by_index.get(new.index)
        if old is None:
            whole.outputs.append(new)
            continue
        _grow(old, new)
    whole.finished, whole.prompt_logprobs = delta.finished, delta.prompt_logprobs
    whole.num_cached_tokens = delta.num_cached_tokens
    return whole


def _grow(old: CompletionOutput, new: CompletionOutput) -> None:
    old.text += new.text
    old.token_ids = old.token_ids + new.token_ids
    if old.logprobs is not None and new.logprobs is not None:
        old.logprobs = old.logprobs + new.logprobs
    old.cumulative_logprob = new.cumulative_logprob
    old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason
