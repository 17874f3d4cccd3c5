"""What `show` and `env` print."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from minilora_kernels import cpu
from minilora_kernels.code_files import cache_root, code_folder
from minilora_kernels.formats import FORMAT_NAMES
from minilora_kernels.limits import usable_cores
from minilora_kernels.pack import COLUMNS, ROWS

from . import __version__
from .checkpoint.resolve import resolve
from .errors import UsageError
from .loading import load_model
from .memory import free_memory
from .peft import CONFIG, adapter_settings, open_tensors
from .plan import Target
from .progress import Report


def describe(name: str, dtype: str, report: Report) -> dict[str, Any]:
    """The facts of a model or adapter. Raises NotFoundError and the like."""
    path = resolve(name, report)
    if (path / CONFIG).exists():
        if dtype != "auto":
            raise UsageError(f"{name} is an adapter, which is not packed as {dtype}", "Leave --dtype out.")
        return {"name": name, **_describe_adapter(path)}
    weights = load_model(path, name, Target(dtype), report).weights
    config = weights.config
    numbers = int((weights.matrices[:, ROWS] * weights.matrices[:, COLUMNS]).sum())
    return {
        "name": name,
        "architecture": config.architecture,
        "layers": config.layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.heads} query, {config.kv_heads} key-value, of {config.head_dim}",
        "feed-forward": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "parameters": f"{numbers / 1e6:.1f} million",
        "formats": ", ".join(f"{FORMAT_NAMES[fmt]} {weights.bytes_of(fmt) / 1e6:.1f} MB" for fmt in weights.formats),
        "bytes": len(weights.arena),
        "tied embeddings": config.tie_word_embeddings,
    }


def _describe_adapter(folder: Path) -> dict[str, Any]:
    file = open_tensors(folder)
    shapes: dict[str, dict[str, None]] = {}
    for name, tensor in sorted(file.tensors.items()):
        module = name.partition(".lora_")[0].rpartition(".")[2]
        shapes.setdefault(module, {})["x".join(map(str, tensor.shape))] = None
    return {
        **adapter_settings(folder),
        "shapes": "; ".join(f"{module} {', '.join(found)}" for module, found in shapes.items()),
        "formats": ", ".join(sorted({FORMAT_NAMES[file.format(name)] for name in file.tensors})),
        "bytes": file.path.stat().st_size,
    }


def environment() -> dict[str, Any]:
    """Versions, CPU and folders."""
    triple, model, _ = cpu.target()
    return {
        "minilora": __version__,
        "python": sys.version.split()[0],
        **{
            name: _version(name)
            for name in ("numpy", "numba", "llvmlite", "tokenizers", "safetensors", "huggingface-hub")
        },
        "platform": platform.platform(),
        "cpu": f"{model} ({triple}), {cpu.family()} kernels",
        "cores": usable_cores(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.1f} GB, {free_memory() / 1e9:.1f} free for this process",
        "cache": str(cache_root()),
        "kernels": str(code_folder()),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
