"""What a model is: ModelConfig from config.json, and the table of architectures.

A new architecture of the Llama family is one row of ARCHITECTURES, from which weights and parity tests derive;
README lists it too. A key of config.json that is neither used nor known to be harmless (see config_keys) raises: it may
change the mathematics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config_keys import GENERATION, HARMLESS, NEUTRAL, USED
from .errors import FormatError, UnsupportedError
from .rope import Rope, check_kind, is_positive


@dataclass(frozen=True)
class Arch:
    """How an architecture differs from plain Llama.

    model_type: the name in config.json; keys: those of SOME_USE that count; qkv_bias, qk_norm: always there; fused:
    q, k, v and gate, up stored as one matrix each; partial: whether partial_rotary_factor may rotate a part of a head;
    no_rope_interval: every so many layers one does not rotate q and k, and only these have windows; longrope_names: how
    its files also call the rule longrope. The rest is what holds where config.json does not say: sliding: whether
    sliding_window counts; window: its size; full_layers: layers before the first that has it; theta: rope's base; ties:
    whether input and output embedding are one.
    """

    model_type: str
    keys: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    partial: bool = False
    no_rope_interval: int = 0
    longrope_names: tuple[str, ...] = ()
    sliding: bool = False
    window: int = 0
    full_layers: int = 0
    theta: float = 10000.0
    ties: bool = False


_BIASES = ("attention_bias", "mlp_bias")
_WINDOWS = ("use_sliding_window", "sliding_window", "layer_types")

ARCHITECTURES = {
    "LlamaForCausalLM": Arch("llama", _BIASES),
    "MistralForCausalLM": Arch("mistral", ("sliding_window", "layer_types"), sliding=True, window=4096),
    "Qwen2ForCausalLM": Arch("qwen2", (*_WINDOWS, "max_window_layers"), qkv_bias=True, window=4096, full_layers=28),
    "Qwen3ForCausalLM": Arch(
        "qwen3", (*_WINDOWS, "max_window_layers", "attention_bias"), qk_norm=True, window=4096, full_layers=28
    ),
    "SmolLM3ForCausalLM": Arch(
        "smollm3",
        (*_BIASES, *_WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
        no_rope_interval=4,
        theta=2000000.0,
        ties=True,
    ),
    "Phi3ForCausalLM": Arch(
        "phi3", ("sliding_window",), fused=True, partial=True, longrope_names=("su", "yarn"), sliding=True
    ),
}

# Keys that only some architectures use: the models of the others do not look at them.
SOME_USE = frozenset(key for arch in ARCHITECTURES.values() for key in arch.keys)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-family model: config.json's names, without num_ and hidden_ where these say nothing.

    windows: for each layer, how many positions a token sees, 0 for all; rotary: for each layer, whether it
    rotates q and k; qkv_bias, o_bias, mlp_bias, qk_norm: which extra vectors the layers have.
    """

    architecture: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    windows: tuple[int, ...]
    rotary: tuple[bool, ...]
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    fused: bool = False
    eos_token_ids: tuple[int, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def qkv_rows(self) -> int:
        """Columns of the activations that q, k and v take together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.heads // self.kv_heads

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """Read the content of config.json. Raises FormatError and UnsupportedError, naming the key."""
        return _Reader(data).config()


class _Reader:
    """Takes values out of config.json, checking each."""

    def __init__(self, data: Mapping[str, Any]):
        if not isinstance(data, Mapping):
            raise FormatError("config.json holds no JSON object")
        self.source = dict(data)
        self.name = self.architecture()
        self.arch = ARCHITECTURES[self.name]
        self.data = {key: data[key] for key in data if key not in SOME_USE or key in self.arch.keys}

    def architecture(self) -> str:
        names = self.source.get("architectures") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"config.json: architectures must be a list of names, not {names!r}")
        for name in names:
            if name in ARCHITECTURES:
                return name
        for name, arch in ARCHITECTURES.items():
            if not names and arch.model_type == self.source.get("model_type"):
                return name
        found = ", ".join(names) or self.source.get("model_type")
        raise UnsupportedError(f"config.json: unknown architecture {found}", f"Known: {', '.join(ARCHITECTURES)}.")

    def integer(self, key: str, default: int | None = None, limit: int = 1 << 24, least: int = 1) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
            raise FormatError(f"config.json: {key} must be an integer from {least} to {limit}, not {value!r}")
        return value

    def number(self, key: str, default: float, inner: Mapping[str, Any] | None = None) -> float:
        """inner: an object of config.json in which the key counts before one beside it."""
        value = (inner or {}).get(key)
        value = self.data.get(key) if value is None else value
        value = default if value is None else value
        if not is_positive(value):
            raise FormatError(f"config.json: {key} must be a positive number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise FormatError(f"config.json: {key} must be true or false, not {value!r}")
        return value

    def config(self) -> ModelConfig:
        self.check_keys()
        width, layers = self.integer("hidden_size"), self.integer("num_hidden_layers", limit=1024)
        heads = self.integer("num_attention_heads", limit=4096)
        kv_heads = self.integer("num_key_value_heads", heads, limit=4096)
        head_dim = self.integer("head_dim", width // heads or None, limit=1024)
        forward = self.integer("intermediate_size")
        if heads % kv_heads:
            raise FormatError(f"config.json: {heads} attention heads are no multiple of {kv_heads} key-value heads")
        for key, size, step in (
            ("head_dim", head_dim, 16),
            ("hidden_size", width, 32),
            ("intermediate_size", forward, 32),
        ):
            if size % step:
                raise UnsupportedError(
                    f"config.json: {key} {size} is not a multiple of {step}, as minilora's kernels need it",
                    "Take another model: this one can't be run.",
                )
        length = self.integer("max_position_embeddings", 2048, limit=1 << 30)
        bias, rotary = self.flag("attention_bias"), self.rotary(layers)
        return ModelConfig(
            architecture=self.name,
            hidden_size=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=forward,
            vocab_size=self.integer("vocab_size"),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            max_position_embeddings=length,
            rope=self.rope(head_dim, length),
            windows=self.windows(rotary),
            rotary=rotary,
            tie_word_embeddings=self.flag("tie_word_embeddings", self.arch.ties),
            qkv_bias=self.arch.qkv_bias or bias,
            o_bias=bias,
            mlp_bias=self.flag("mlp_bias"),
            qk_norm=self.arch.qk_norm,
            fused=self.arch.fused,
            eos_token_ids=token_ids(self.data.get("eos_token_id"), "eos_token_id"),
            source=self.source,
        )

    def check_keys(self) -> None:
        known = USED | SOME_USE | HARMLESS | GENERATION
        unknown = sorted(
            key
            for key, value in self.source.items()
            if key not in known and not asks_nothing(value) and not (key in NEUTRAL and value == NEUTRAL[key])
        )
        if unknown:
            raise UnsupportedError(
                f"config.json has {', '.join(unknown)}: minilora does not know what this changes",
                "If it changes nothing in the computation, remove it from config.json.",
            )
        if self.data.get("quantization_config"):
            raise UnsupportedError(
                "config.json has a quantization_config: weights quantised by other tools are not read",
                "Take the unquantised checkpoint and --dtype int8 or int4, or a GGUF file.",
            )
        activation = self.data.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedError(f"config.json: hidden_act {activation!r}, only silu is known")

    def rope(self, head_dim: int, length: int) -> Rope:
        scaling = self.data.get("rope_parameters") or self.data.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise FormatError(f"config.json: rope scaling must be an object, not {scaling!r}")
        if any(isinstance(value, Mapping) for value in scaling.values()):
            raise UnsupportedError(
                "config.json: rope parameters differ between layers, which minilora does not compute"
            )
        name = scaling.get("rope_type") or scaling.get("type") or "default"
        kind = "longrope" if name in self.arch.longrope_names else check_kind(name)
        own = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        parameters = {k: v for k, v in scaling.items() if v is not None and k not in own}
        if self.data.get("original_max_position_embeddings") is not None:
            parameters.setdefault("original_max_position_embeddings", self.data["original_max_position_embeddings"])
        dim = self.rotated(head_dim, self.number("partial_rotary_factor", 1.0, scaling))
        return Rope(self.number("rope_theta", self.arch.theta, scaling), dim, length, kind, parameters)

    def rotated(self, head_dim: int, part: float) -> int:
        """How many numbers of a head are rotated. Other programs differ where the architecture knows no part."""
        if part != 1 and not self.arch.partial:
            raise UnsupportedError(f"config.json: partial_rotary_factor {part!r}: {self.name} rotates whole heads")
        dim = int(head_dim * part) if part <= 1 else 0
        if not dim or dim % 2:
            raise FormatError(
                f"config.json: partial_rotary_factor {part!r} leaves {dim} of {head_dim} numbers to rotate"
            )
        return dim

    def windows(self, rotary: tuple[bool, ...]) -> tuple[int, ...]:
        layers, active = len(rotary), self.flag("use_sliding_window", self.arch.sliding)
        given = self.data.get("sliding_window", self.arch.window or None)
        window = self.integer("sliding_window", given, limit=1 << 30) if given and active else 0
        kinds = self.data.get("layer_types")
        if kinds is None:
            first = self.integer("max_window_layers", self.arch.full_layers, least=0)
            # Where some layers do not rotate, these are the ones with a window.
            return tuple(
                window if layer >= first and not (self.arch.no_rope_interval and rotates) else 0
                for layer, rotates in enumerate(rotary)
            )
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise FormatError(f"config.json: layer_types must list {layers} layers")
        if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
            raise UnsupportedError(f"config.json: layer type {unknown[0]}")
        if "sliding_attention" in kinds and not window:
            raise FormatError("config.json: layer_types has sliding_attention, but no sliding_window is in use")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

    def rotary(self, layers: int) -> tuple[bool, ...]:
        if not self.arch.no_rope_interval:
            return (True,) * layers
        marks = self.data.get("no_rope_layers")
        if marks is None:
            interval = self.integer("no_rope_layer_interval", self.arch.no_rope_interval)
            return tuple((layer + 1) % interval != 0 for layer in range(layers))
        if not isinstance(marks, list) or len(marks) < layers or not all(mark in (0, 1) for mark in marks):
            raise FormatError(f"config.json: no_rope_layers must hold {layers} zeros and ones")
        return tuple(mark == 1 for mark in marks[:layers])


def asks_nothing(value: Any) -> bool:
    """Whether a setting is null, false or empty, and so changes nothing whatever it means."""
    return value is None or value is False or value == [] or value == {}


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """One id, a list of ids or null, as a tuple. Raises FormatError."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise FormatError(f"{key} must be a token id or a list of them, not {value!r}")
    return tuple(ids)
