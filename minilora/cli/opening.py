"""From options to what a run needs: the model, its adapters, sampling parameters, the prompt's tokens."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .options import split_lora, split_scale
from .report import Reporter, announce_compiling

if TYPE_CHECKING:
    from ..llm import LLM
    from ..outputs import LoRARequest
    from ..params import SamplingParams
    from ..plain import PlainLLM

    Model = LLM | PlainLLM


@contextmanager
def keeping() -> Iterator[None]:
    """Imports done within are frozen out of garbage collection."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def open_model(
    reporter: Reporter, model: str, dtype: str, group_size: str, threads: int | None, **engine: Any
) -> "LLM":
    """The model with an engine. engine: EngineConfig's other fields."""
    with keeping():
        from ..llm import LLM

    announce_compiling(reporter)
    return LLM(model, dtype=dtype, group_size=int(group_size), threads=threads, report=reporter, **engine)


def open_plain(reporter: Reporter, model: str, dtype: str, group_size: str) -> "PlainLLM":
    """The model with the NumPy reference."""
    from ..plain import PlainLLM

    return PlainLLM(model, dtype=dtype, group_size=int(group_size), report=reporter)


def load_loras(llm: "Model", loras: Sequence[str], reporter: Reporter) -> dict[str, float]:
    """Load what --lora names; returns their scales."""
    scales: dict[str, float] = {}
    for text in loras:
        name, path, scale = split_lora(text)
        llm.add_lora(name, path, report=reporter)
        scales[name] = scale
    return scales


def choose_adapters(
    llm: "Model", scales: Mapping[str, float], adapters: Sequence[str], reporter: Reporter
) -> list["LoRARequest"]:
    """The adapters of a request: those that --adapter names, loaded if need be, or else all of --lora's.

    scales: of --lora's, by name.
    """
    from ..outputs import LoRARequest

    if not adapters:
        return [LoRARequest(name, scale=scale) for name, scale in scales.items()]
    chosen = []
    for text in adapters:
        name, scale = split_scale(text)
        if name not in llm.adapters:
            llm.add_lora(name, name, report=reporter)
        chosen.append(LoRARequest(name, scale=scale * scales.get(name, 1.0)))
    return chosen


def sampling_params(
    llm: "Model", seed: int | None, stop: Sequence[str], max_tokens: int, **given: Any
) -> "SamplingParams":
    """What the options say, over the model's own defaults; greedy where the model has none."""
    chosen = {key: value for key, value in given.items() if value is not None}
    if "temperature" not in llm.model.generation:
        chosen.setdefault("temperature", 0.0)
    return llm.model.default_params(max_tokens=max_tokens, stop=list(stop), seed=seed, **chosen)


def prompt_ids(llm: "Model", prompt: str, system: str | None, raw: bool) -> list[int]:
    """The tokens of a prompt through the model's chat template, or with `raw` as it is. Raises UsageError."""
    from ..chat import encode_chat

    if raw or llm.tokenizer.files.chat_template is None:
        if system:
            raise UsageError("--system needs a model with a chat template, and no --raw")
        return llm.tokenizer.encode(prompt)
    return encode_chat(llm.tokenizer, [*system_message(system), {"role": "user", "content": prompt}])


def system_message(system: str | None) -> list[dict[str, str]]:
    """How a conversation begins: with the system's message, if there is one."""
    return [{"role": "system", "content": system}] if system else []
