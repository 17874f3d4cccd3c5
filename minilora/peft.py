"""PEFT's folders: an adapter's config and tensors become an Adapter.

Whatever a folder holds is used or refused by name; nothing is skipped.
"""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from minilora_kernels.convert import widen_float16
from minilora_kernels.pack import BLOCK

from .adapters import EMBED, HEAD, Adapter, Pair, module_shapes
from .checkpoint.safetensors import TensorFile
from .config import ModelConfig, asks_nothing
from .errors import AdapterError, NotFoundError, UnsupportedError
from .files import read_json
from .params import HIGHEST_RANK
from .patterns import Pattern
from .weights import Weights

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# ---------------------------------------------------------------- adapter_config.json

# Keys that matter in training only.
_HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "megatron_config",
        "megatron_core",
        "monteclora_config",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
        "base_model_class",
        "parent_library",
        "tie_lora_adapters",
    ]
)
_READ = frozenset(
    [
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    ]
)
# Initialisations that change the base weights, so that the saved A and B alone are not the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class _Settings:
    """adapter_config.json, checked."""

    def __init__(self, data: Mapping[str, Any]):
        self.data = data
        self._check()
        self.rank = self._rank("r", data.get("r", 8))
        self.alpha = self._alpha("lora_alpha", data.get("lora_alpha", 8))
        self.ranks = {
            key: (pattern, self._rank(f"rank_pattern[{key}]", value))
            for key, pattern, value in self._patterns("rank_pattern")
        }
        self.alphas = {
            key: (pattern, self._alpha(f"alpha_pattern[{key}]", value))
            for key, pattern, value in self._patterns("alpha_pattern")
        }

    def _check(self) -> None:
        data = self.data
        if data.get("peft_type", "LORA") != "LORA":
            raise UnsupportedError(
                f"{CONFIG}: peft_type {data['peft_type']!r}, only LORA adapters are read",
                "Merge it into the base model with PEFT, if PEFT can merge this type.",
            )
        for key, what in (
            ("use_dora", "DoRA"),
            ("fan_in_fan_out", "transposed weights"),
            ("modules_to_save", "whole modules"),
        ):
            if data.get(key):
                raise UnsupportedError(
                    f"{CONFIG}: {key} is set: minilora does not apply {what}", "Merge it into the base model with PEFT."
                )
        if data.get("bias", "none") != "none":
            raise UnsupportedError(
                f"{CONFIG}: bias {data['bias']!r}: minilora does not apply biases of adapters",
                "Merge it into the base model with PEFT.",
            )
        start = data.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise UnsupportedError(
                f"{CONFIG}: init_lora_weights {start!r} changes the base model's weights",
                "Save the adapter with PEFT's path_initial_model_for_weight_conversion.",
            )
        known = _READ | _HARMLESS
        unknown = sorted(key for key, value in data.items() if key not in known and not asks_nothing(value))
        if unknown:
            raise UnsupportedError(
                f"{CONFIG} has {', '.join(unknown)}: minilora does not know what this changes",
                f"If it changes nothing in the computation, remove it from {CONFIG}.",
            )

    def _rank(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= HIGHEST_RANK:
            raise AdapterError(f"{CONFIG}: {key} must be an integer from 1 to {HIGHEST_RANK}, not {value!r}")
        return value

    def _alpha(self, key: str, value: Any) -> float:
        try:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except OverflowError:
            value = "one of hundreds of digits"
        raise AdapterError(f"{CONFIG}: {key} must be a finite number, not {value!r}")

    def _patterns(self, key: str) -> list[tuple[str, Pattern, Any]]:
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise AdapterError(f"{CONFIG}: {key} must be an object")
        found = []
        for text, meant in value.items():
            try:
                found.append((text, Pattern(text), meant))
            except ValueError as error:
                raise AdapterError(
                    f"{CONFIG}: {key} has a pattern that is not usable: {text[:60]!r} ({error})"
                ) from None
        return found

    def rank_of(self, module: str) -> int:
        return _matching(self.ranks, module, self.rank)

    def scaling(self, module: str, rank: int) -> float:
        alpha = _matching(self.alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.data.get("use_rslora") else alpha / rank


def _matching(patterns: Mapping[str, tuple[Pattern, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT finds it."""
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
    for text, (pattern, value) in patterns.items():
        # Most are plain names, of which there may be one for each module.
        if _is_called(module, text) or pattern.matches(module, starts):
            return value
    return default


# ---------------------------------------------------------------- reading a folder


def load_adapter(folder: Path, config: ModelConfig, weights: Weights | None = None) -> Adapter:
    """Read a PEFT folder for a base model of this config.

    weights: the base model's. With adapters of the embedding or head PEFT saves the base's own matrices too; they
    are compared with `weights`, and other ones are refused. Raises NotFoundError, FormatError, UnsupportedError or
    AdapterError, naming the tensor or key.
    """
    if not folder.is_dir():
        raise NotFoundError(f"{folder} is not a folder", "An adapter is a folder with adapter_config.json in it.")
    settings = _Settings(read_json(folder / CONFIG))
    file = open_tensors(folder)
    tensors = {name: file.read(name) for name in file.tensors}
    for name in [name for name in tensors if name.endswith(".base_layer.weight")]:
        _check_base(name, tensors.pop(name), config, weights)
    adapter = adapter_from_arrays(tensors, settings.data, config)
    _check_targets(settings.data, adapter, config)
    return adapter


def open_tensors(folder: Path) -> TensorFile:
    """The tensors of a PEFT folder. Raises NotFoundError, FormatError or UnsupportedError."""
    if not (folder / TENSORS).exists():
        if pickles := [p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]:
            raise UnsupportedError(
                f"{folder} holds {pickles[0]}, a pickle file, which can run code when it is read",
                "Load it with PEFT and save it again: save_pretrained(folder, safe_serialization=True).",
            )
        raise NotFoundError(f"{folder / TENSORS} is missing")
    # In memory: hot replacement may write over the file, and a mapped one that becomes shorter ends the process.
    return TensorFile(folder / TENSORS, in_memory=True)


def _check_base(name: str, copy: np.ndarray, config: ModelConfig, weights: Weights | None) -> None:
    """A copy of the base's embedding or head: it must be the base's, up to the rounding of its format."""
    shape = (config.vocab_size, config.hidden_size)
    if copy.shape != shape or not name.endswith((f"{EMBED}.base_layer.weight", f"{HEAD}.base_layer.weight")):
        raise AdapterError(
            f"{name!r} has shape {copy.shape}, the base model's is {shape}",
            "The adapter was made for another base model.",
        )
    if weights is None:
        return
    matrix = weights.embed if EMBED in name else weights.head
    for first in range(0, config.vocab_size, max(BLOCK, config.vocab_size // 8 // BLOCK * BLOCK)):
        ours, theirs = weights.rows(matrix, first // BLOCK), copy[first : first + BLOCK]
        ours = ours[: len(theirs)]
        if np.linalg.norm(ours - theirs) > 0.2 * np.linalg.norm(ours):
            raise AdapterError(
                f"{name!r} is not the base model's own matrix", "Merge the adapter into its base with PEFT."
            )


def adapter_from_arrays(tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], config: ModelConfig) -> Adapter:
    """An adapter from arrays under PEFT's tensor names and the content of adapter_config.json.

    Raises AdapterError or UnsupportedError, naming the tensor or key.
    """
    checked, shapes = _Settings(settings), module_shapes(config)
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name in sorted(tensors):
        module, half = _parse_name(name, shapes)
        if half in halves.setdefault(module, {}):
            raise AdapterError(f"{name!r}: {half} of {module} is there twice")
        halves[module][half] = np.asarray(tensors[name], np.float32)
    if not halves:
        raise AdapterError("the adapter holds no tensors")
    pairs = {module: _pair(module, found, shapes[module], checked) for module, found in halves.items()}
    return Adapter(pairs)


def tiny_adapter(config: ModelConfig) -> Adapter:
    """An adapter of one module that changes nothing, made by all the steps that a file's numbers go through."""
    module, (rows, columns) = next(iter(module_shapes(config).items()))
    # Arrays read from a file are read-only, for which another program is compiled.
    a, b = (widen_float16(np.frombuffer(bytes(2 * size), np.uint16)) for size in (columns, rows))
    return Adapter({module: Pair(a.reshape(1, columns), b.reshape(rows, 1))})


def _parse_name(name: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, str]:
    """(module, "A" or "B") of a PEFT tensor name."""
    match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?", name)
    if not match:
        what = "DoRA's magnitudes" if "lora_magnitude" in name else "a tensor that is not half of a LoRA pair"
        raise UnsupportedError(f"{name!r} is {what}, which minilora does not apply")
    module = match[1]
    if module not in shapes:
        raise AdapterError(f"{name!r}: the base model has no module {module!r} that adapters can change")
    if bool(match[2]) != (module == EMBED):
        raise AdapterError(f"{name!r}: not the form that PEFT writes for {module!r}")
    return module, match[3]


def _pair(module: str, halves: Mapping[str, np.ndarray], shape: tuple[int, int], settings: _Settings) -> Pair:
    if missing := {"A", "B"} - halves.keys():
        raise AdapterError(f"{module}: lora_{missing.pop()} is missing")
    a, b, (rows, columns) = halves["A"], halves["B"], shape
    rank = settings.rank_of(module)
    for name, half, wanted in (("A", a, (rank, columns)), ("B", b, (rows, rank))):
        if half.shape != wanted:
            raise AdapterError(
                f"{module}: lora_{name} has shape {half.shape}, rank {rank} on this base model needs {wanted}",
                "The adapter was made for another base model, or its config names another rank.",
            )
    return Pair(a, b * np.float32(settings.scaling(module, rank)))


def _check_targets(settings: Mapping[str, Any], adapter: Adapter, config: ModelConfig) -> None:
    """Every module that the config names must have its tensors, and one of its names must mean any (PEFT's rule)."""
    targets, excluded = (_Choice(key, settings.get(key)) for key in ("target_modules", "exclude_modules"))
    layers, known = _layers(settings), module_shapes(config)
    for name in known:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        chosen = layers is None or (layer is not None and int(layer[1]) in layers)
        if chosen and targets.has(name) and not excluded.has(name) and name not in adapter.pairs:
            raise AdapterError(f"{CONFIG} names {name!r} as a target, but its tensors are missing")
    if targets.names and not any(_is_called(name, target) for name in known for target in targets.names):
        raise AdapterError(
            f"{CONFIG} names the targets {', '.join(targets.names)}, none of which the base model has",
            "The adapter was made for another base model.",
        )


def _is_called(module: str, name: str) -> bool:
    """Whether a name from a list means this module, as PEFT has it."""
    return module == name or module.endswith(f".{name}")


class _Choice:
    """The modules that target_modules or exclude_modules means: a list of names, or a pattern.

    A pattern that is not usable means none; so does "all-linear", which PEFT replaces by names when it saves.
    """

    def __init__(self, key: str, value: Any):
        self.names: list[str] = value if isinstance(value, list) else []
        if not all(isinstance(name, str) for name in self.names) or not isinstance(value, str | list | None):
            raise AdapterError(f"{CONFIG}: {key} must hold names")
        self._pattern: Pattern | None = None
        if isinstance(value, str):
            with suppress(ValueError):
                self._pattern = Pattern(value)

    def has(self, module: str) -> bool:
        if self._pattern is not None:
            return self._pattern.matches(module)
        return any(_is_called(module, name) for name in self.names)


def _layers(settings: Mapping[str, Any]) -> set[int] | None:
    """The layers that layers_to_transform means; None where it does not count: all, and what is in no layer too."""
    chosen = settings.get("layers_to_transform")
    listed = [chosen] if isinstance(chosen, int) else chosen or []
    if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
        raise AdapterError(f"{CONFIG}: layers_to_transform must be a layer's number or a list of them, not {chosen!r}")
    return None if isinstance(settings.get("target_modules"), str) else set(listed) or None


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What adapter_config.json says of rank, alpha, modules and base model.

    Raises what load_adapter raises for that file.
    """
    settings = _Settings(read_json(folder / CONFIG))
    others = {key: settings.data.get(key) for key in ("target_modules", "base_model_name_or_path")}
    return {"r": settings.rank, "lora_alpha": settings.alpha, **others}
