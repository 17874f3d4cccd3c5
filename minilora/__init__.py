"""minilora: Llama-family language models with many LoRA adapters on ordinary CPUs, in pure Python."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .async_engine import AsyncEngine as AsyncEngine
    from .llm import LLM as LLM
    from .outputs import CompletionOutput as CompletionOutput
    from .outputs import Logprob as Logprob
    from .outputs import LoRARequest as LoRARequest
    from .outputs import RequestOutput as RequestOutput
    from .params import EngineConfig as EngineConfig
    from .params import SamplingParams as SamplingParams

# Loaded on first use, so that `import minilora` and `--help` cost nothing.
_WHERE = {
    "AsyncEngine": "async_engine",
    "LLM": "llm",
    "SamplingParams": "params",
    "EngineConfig": "params",
    "LoRARequest": "outputs",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "EngineConfig",
    "LoRARequest",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
