"""GGUF: every rule of the format, every tensor type, and whole models against their safetensors twins."""

import struct
import time

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.checkpoint import open_checkpoint
from minilora.checkpoint.ggml import BLOCK_TYPES
from minilora.checkpoint.gguf import Gguf
from minilora.errors import FormatError, MiniloraError, UnsupportedError
from minilora.plan import DOWN, GATE_UP, QKV, QKV_PARTS, O
from minilora.reference import Reference
from minilora.rope import Rope
from minilora_kernels.formats import (
    FORMAT_NAMES,
    INT4_MIN,
    INT4K_MIN,
    INT5,
    INT6K,
    INT8_MIN,
    common_format,
    is_float,
    is_nested,
)
from minilora_kernels.pack import FORMAT, GROUP
from minilora_kernels.quantized import Quantized, convert, dequantize

from .gguf_maker import K_QUANTS, QUANTISED, entry, header, random_blocks, string, tensor, write_llama
from .support import load_weights, make_engine, prompt_logits, random_tokens
from .test_network import largest_error, reference_logprobs

U64 = (1 << 64) - 1
ALIGN = entry("general.alignment", 4, struct.pack("<I", 32))


def padded(data: bytes, extra: int = 0) -> bytes:
    return data + bytes(-len(data) % 32 + extra)


MALFORMED = {
    "empty": b"",
    "only magic": b"GGUF",
    "wrong magic": header(0, 0, magic=b"GGML"),
    "version 0": header(0, 0, version=0),
    "version 1": header(0, 0, version=1),
    "future version": header(0, 0, version=99),
    "big-endian version": header(0, 0, version=3 << 24),
    "49 bytes that promise an array": header(0, 1) + entry("a", 9, struct.pack("<IQ", 8, 1 << 60)),
    "2^31 tensors": header(1 << 31, 0),
    "2^63 tensors": header(1 << 63, 0),
    "2^64-1 entries": header(0, U64),
    "key longer than the file": header(0, 1) + struct.pack("<Q", 1 << 40) + b"abc",
    "key of 2^64-1": header(0, 1) + struct.pack("<Q", U64) + b"abc" * 9,
    "empty key": header(0, 1) + entry("", 4, bytes(4)),
    "key twice": header(0, 2) + ALIGN + ALIGN,
    "key not UTF-8": header(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 4) + bytes(8),
    "unknown type": header(0, 1) + entry("a", 77, bytes(16)),
    "bool of 2": header(0, 1) + entry("a", 7, b"\x02") + bytes(16),
    "array of arrays": header(0, 1) + entry("a", 9, struct.pack("<IQ", 9, 1) + bytes(64)),
    "array cut short": header(0, 1) + entry("a", 9, struct.pack("<IQ", 4, 9) + bytes(8)),
    "alignment 0": header(0, 1) + entry("general.alignment", 4, struct.pack("<I", 0)),
    "alignment 48": header(0, 1) + entry("general.alignment", 4, struct.pack("<I", 48)),
    "alignment 2^31": header(0, 1) + entry("general.alignment", 4, struct.pack("<I", 1 << 31)),
    "alignment of the wrong type": header(0, 1) + entry("general.alignment", 8, string("32")),
    "no dimensions": padded(header(1, 0) + tensor("t", ()), 64),
    "five dimensions": padded(header(1, 0) + tensor("t", (1, 1, 1, 1, 1)), 64),
    "zero dimension": padded(header(1, 0) + tensor("t", (0, 4)), 64),
    "shape overflows": padded(header(1, 0) + tensor("t", (1 << 40, 1 << 40)), 64),
    "shape of 2^64-1": padded(header(1, 0) + tensor("t", (U64,)), 64),
    "row no multiple of the block": padded(header(1, 0) + tensor("t", (33, 2), kind=8), 640),
    "unknown tensor type": padded(header(1, 0) + tensor("t", (32,), kind=99), 640),
    "offset not aligned": padded(header(1, 0) + tensor("t", (4,), offset=4), 640),
    "offset beyond the file": padded(header(1, 0) + tensor("t", (4,), offset=1 << 40), 640),
    "offset of 2^64-32": padded(header(1, 0) + tensor("t", (4,), offset=U64 - 31), 640),
    "data cut short": padded(header(1, 0) + tensor("t", (64,)), 128),
    "tensor twice": padded(header(2, 0) + tensor("t", (4,)) + tensor("t", (4,), offset=32), 128),
    "tensors overlap": padded(header(2, 0) + tensor("t", (16,)) + tensor("u", (4,), offset=32), 128),
    "name longer than allowed": padded(header(1, 0) + tensor("t" * 300, (4,)), 64),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_s1_gguf_bounds(tmp_path, name):
    path = tmp_path / "bad.gguf"
    path.write_bytes(MALFORMED[name])
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        Gguf(path)
    assert "bad.gguf" in caught.value.cause and "\n" not in caught.value.cause


def test_a_valid_small_file_is_read(tmp_path):
    """The maker above makes valid files too: what is refused is refused for its fault."""
    path = tmp_path / "good.gguf"
    entries = ALIGN + entry("a", 9, struct.pack("<IQ", 8, 2) + string("x") + string("y")) + entry("b", 7, b"\x01")
    path.write_bytes(padded(header(1, 3) + entries + tensor("t", (4, 2))) + np.arange(8, dtype=np.float32).tobytes())
    file = Gguf(path)
    assert file.metadata == {"general.alignment": 32, "a": ["x", "y"], "b": True}
    assert file.tensors["t"].shape == (2, 4)
    assert np.array_equal(
        BLOCK_TYPES[0].floats(file.rows(file.tensors["t"])), np.arange(8, dtype=np.float32).reshape(2, 4)
    )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_s2_gguf_oob_read_never(tmp_path_factory, data):
    """Any bytes of a valid file changed or cut: refused, or read as what they now say; quickly either way."""
    base = tmp_path_factory.getbasetemp() / "base.gguf"
    if not base.exists():
        write_llama(base, "Q4_0")
    raw = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = (
            data.draw(st.integers(0, len(raw) - 9))
            if data.draw(st.booleans())
            else data.draw(st.integers(0, min(3000, len(raw) - 9)))
        )
        value = data.draw(st.sampled_from([0, 1, 255, (1 << 31), (1 << 63), U64]))
        raw[at : at + 8] = struct.pack("<Q", value)
    raw = raw[: data.draw(st.integers(1, len(raw)))] if data.draw(st.booleans()) else raw
    path = base.with_name("fuzzed.gguf")
    path.write_bytes(raw)
    started = time.monotonic()
    try:
        checkpoint = open_checkpoint(path)
        load_weights(path)
        checkpoint.tokenizer()
    except MiniloraError:
        pass
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("code", BLOCK_TYPES)
def test_types_are_decoded_exactly(code):
    kind = BLOCK_TYPES[code]
    raw = random_blocks(kind, np.random.default_rng(code), 6, 4)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(code))
    assert np.array_equal(kind.floats(raw), expected.reshape(6, -1))


@pytest.mark.parametrize("kind", QUANTISED)
def test_models_equal_the_reference(tmp_path, kind):
    path = tmp_path / "model.gguf"
    originals = write_llama(path, kind)
    weights = load_weights(path)
    expected_format = {
        "Q4_0": "int4",
        "Q4_1": "int4+min",
        "Q5_0": "int5",
        "Q5_1": "int5+min",
        "Q8_0": "int8",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
    }[kind]
    assert [FORMAT_NAMES[fmt] for fmt in weights.formats] == [expected_format]
    floats = weights.floats()
    for name, original in originals.items():
        qtype = gguf.GGMLQuantizationType[kind]
        stored = (
            original if original.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(original, qtype), qtype)
        )
        assert np.array_equal(floats[name], stored), name
    tokens = random_tokens(np.random.default_rng(1), 40)
    engine = make_engine(weights)
    bound = 0.3 if kind.startswith("Q") else 0.02
    assert (
        largest_error(prompt_logits(engine, tokens), reference_logprobs(weights, tokens, engine.length), tokens) < bound
    )


def test_float32_on_request_is_exact(tmp_path):
    path = tmp_path / "model.gguf"
    write_llama(path, "Q4_1")
    weights = load_weights(path, "float32")
    tokens = random_tokens(np.random.default_rng(1), 40)
    engine = make_engine(weights)
    assert (
        largest_error(prompt_logits(engine, tokens), reference_logprobs(weights, tokens, engine.length), tokens) < 2e-4
    )


def test_types_may_differ_within_a_layer(tmp_path):
    """q, k and v, or gate and up, of different types are brought together without a new rounding."""
    mixed = {
        "blk.0.attn_v.weight": "Q8_0",
        "blk.1.attn_q.weight": "Q5_1",
        "blk.0.ffn_up.weight": "Q5_0",
        "blk.1.ffn_gate.weight": "F16",
    }
    path, plain = tmp_path / "model.gguf", tmp_path / "plain.gguf"
    originals = write_llama(path, "Q4_0", mixed=mixed, head_dim=32)
    write_llama(plain, "Q4_0", head_dim=32)
    floats = load_weights(path).floats()
    for name, original in originals.items():
        ours = {
            "model.layers.0.self_attn.v_proj.weight": "Q8_0",
            "model.layers.1.self_attn.q_proj.weight": "Q5_1",
            "model.layers.0.mlp.up_proj.weight": "Q5_0",
            "model.layers.1.mlp.gate_proj.weight": "F16",
        }.get(name, "Q4_0")
        qtype = gguf.GGMLQuantizationType[ours]
        if original.ndim > 1:
            stored = gguf.quants.dequantize(gguf.quants.quantize(original, qtype), qtype)
            assert np.allclose(floats[name], stored, rtol=1e-3, atol=1e-6), name
    weights = load_weights(path)
    # The smallest format that holds Q4_0 and Q5_0.
    assert weights.matrices[weights.layers[0, GATE_UP], FORMAT] == INT5
    tokens = random_tokens(np.random.default_rng(1), 40)
    engine = make_engine(weights)
    assert (
        largest_error(prompt_logits(engine, tokens), reference_logprobs(weights, tokens, engine.length), tokens) < 0.3
    )


def assert_equals_the_reference(weights, floats, tokens, rounded=()):
    """The packed weights are these, those `rounded` within float16's rounding, and the engine computes with them."""
    for name, exact in floats.items():
        bound = 5e-4 * np.linalg.norm(exact) if name in rounded else 0
        assert np.linalg.norm(weights.floats()[name] - exact) <= bound, name
    expected = reference_logprobs(weights, tokens, len(tokens))
    one, *several = (prompt_logits(make_engine(weights, threads=threads), tokens) for threads in (1, 2, 3))
    assert largest_error(one, expected, tokens) < 0.3
    assert all(other == one for other in several)


@pytest.mark.parametrize("kind", K_QUANTS)
def test_models_of_k_quants_equal_the_reference(tmp_path, kind):
    path, tokens = tmp_path / "model.gguf", random_tokens(np.random.default_rng(1), 40)
    write_llama(path, kind, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    weights = load_weights(path)
    names = {"Q2_K": "int2k+min", "Q3_K": "int4k", "Q4_K": "int4k+min", "Q5_K": "int5k+min", "Q6_K": "int6k"}
    assert [FORMAT_NAMES[fmt] for fmt in weights.formats] == [names[kind]]
    assert set(weights.matrices[:, GROUP]) == {32 if kind in ("Q4_K", "Q5_K") else 16}
    assert_equals_the_reference(weights, load_weights(path, "float32").floats(), tokens)


def test_k_quants_may_differ_within_a_layer(tmp_path):
    """As in Q4_K_M files; where inputs are quantised once for several tensors, all take the smallest group."""
    mixed = {
        "blk.0.attn_v.weight": "Q6_K",
        "blk.0.ffn_down.weight": "Q6_K",
        "blk.1.attn_q.weight": "Q3_K",
        "blk.1.ffn_gate.weight": "Q6_K",
        "blk.1.ffn_up.weight": "Q5_K",
        "output.weight": "Q6_K",
    }
    path, tokens = tmp_path / "model.gguf", random_tokens(np.random.default_rng(1), 40)
    write_llama(path, "Q4_K", mixed=mixed, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    weights = load_weights(path)
    first, second = weights.layers
    of_layer = weights.matrices[first[QKV] : first[QKV] + first[QKV_PARTS]]
    assert [(FORMAT_NAMES[row[FORMAT]], row[GROUP]) for row in of_layer] == [("int4k+min", 16), ("int6k", 16)]
    assert weights.matrices[first[DOWN], FORMAT] == INT6K and weights.matrices[first[O], GROUP] == 32
    # Six bits and a minimum: the smallest format for both is int8 with one, of which scales are float16.
    assert weights.matrices[second[GATE_UP], FORMAT] == INT8_MIN and weights.matrices[second[GATE_UP], GROUP] == 16
    rounded = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")}
    assert_equals_the_reference(weights, load_weights(path, "float32").floats(), tokens, rounded)


def test_llama3_rope_factors(tmp_path):
    """Divisors of the frequencies stored as a tensor act as the llama3 rule that they came from."""
    path = tmp_path / "model.gguf"
    write_llama(path)
    checkpoint = open_checkpoint(path)
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    config = checkpoint.config.source | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": divisors.tolist(),
            "long_factor": divisors.tolist(),
            "attention_factor": 1.0,
        }
    }
    rope = type(checkpoint.config).from_dict(config).rope
    cos, _ = rope.tables(50)
    frequencies = 10000.0 ** -(np.arange(0, 16, 2) / 16) / divisors
    assert np.allclose(cos, np.cos(np.arange(50)[:, None] * frequencies), atol=1e-5)
    assert Reference(checkpoint.config, {}, 4).cos.shape == (4, 8)


SHORT, LONG = {"short_factor": [1.5] * 8}, {"long_factor": [3.0] * 8}
ROPES = [
    ({}, {}, Rope(1e4, 16, 1024)),
    ({"factor": 4.0}, {}, Rope(1e4, 16, 1024, "linear", {"factor": 4.0})),
    ({"type": "none", "factor": 4.0}, {}, Rope(1e4, 16, 1024)),
    (
        {"type": "yarn", "factor": 4.0, "original_context_length": 128, "attn_factor": 0.9},
        {},
        Rope(
            1e4,
            16,
            1024,
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 0.9 * (1 + 0.1 * np.log(4.0))},
        ),
    ),
    (
        {"original_context_length": 128, "attn_factor": 1.2},
        SHORT | LONG,
        Rope(
            1e4,
            16,
            1024,
            "longrope",
            {"original_max_position_embeddings": 128, "attention_factor": 1.2, **SHORT, **LONG},
        ),
    ),
]


def write_rope(path, entries, factors):
    """A tiny llama with these entries of rope.scaling and these factors as tensors."""

    def extra(writer):
        for key, value in entries.items():
            add_value = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add_value(f"llama.rope.scaling.{key}", value)
        for key, values in factors.items():
            name = f"rope_factors_{key.removesuffix('_factor')}.weight"
            writer.add_tensor(name, np.array(values, np.float32))

    write_llama(path, extra=extra)


@pytest.mark.parametrize("entries, factors, expected", ROPES)
@pytest.mark.parametrize("length", [100, 200])
def test_rope_scaling_is_read_as_llama_cpp_does(tmp_path, entries, factors, expected, length):
    """Linear where no type is given; long and short factors, and attn_factor, whatever the type."""
    write_rope(tmp_path / "model.gguf", entries, factors)
    found = open_checkpoint(tmp_path / "model.gguf").config.rope
    assert np.allclose(found.tables(length), expected.tables(length), atol=1e-6)


@pytest.mark.parametrize(
    "entries, factors, error, word",
    [
        ({"type": "dynamic", "factor": 4.0}, {}, UnsupportedError, "'dynamic'"),
        ({"attn_factor": 1.2}, {}, UnsupportedError, "attn_factor"),
        ({"type": "yarn"}, SHORT | LONG, UnsupportedError, "'yarn' together with factors"),
        ({}, SHORT, FormatError, "rope_factors_long"),
    ],
)
def test_rope_scaling_that_contradicts_itself_is_refused(tmp_path, entries, factors, error, word):
    write_rope(tmp_path / "model.gguf", entries, factors)
    with pytest.raises(error, match=word):
        open_checkpoint(tmp_path / "model.gguf")


def test_layers_with_windows(tmp_path):
    """GGUF's llama is Mistral too."""
    write_llama(tmp_path / "model.gguf", extra=lambda writer: writer.add_sliding_window(9))
    assert open_checkpoint(tmp_path / "model.gguf").config.windows == (9, 9)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"general.architecture": "gptj"}, "gptj"),
        ({"llama.expert_count": 4}, "expert_count"),
        ({"llama.logit_scale": 2.0}, "logit_scale"),
        ({"llama.rope.dimension_count": 8}, "rotates whole heads"),
    ],
)
def test_unknown_mathematics_raises(tmp_path, monkeypatch, change, word):
    path = tmp_path / "model.gguf"
    write_llama(path)
    original = Gguf.__init__

    def changed(self, path):
        original(self, path)
        self.metadata |= change

    monkeypatch.setattr(Gguf, "__init__", changed)
    with pytest.raises(UnsupportedError, match=word):
        open_checkpoint(path)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_llama(path, "F32")
    # Of the same length, so that nothing else moves.
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1))
    with pytest.raises(FormatError, match="attn_k"):
        open_checkpoint(path)


def test_one_layer_under_two_numbers_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    write_llama(path, "F32")
    original = Gguf.__init__

    def changed(self, path):
        original(self, path)
        self.tensors["blk.00.attn_q.weight"] = self.tensors["blk.0.attn_q.weight"]

    monkeypatch.setattr(Gguf, "__init__", changed)
    with pytest.raises(FormatError, match="another name"):
        open_checkpoint(path)


def change_first(path, name, at, numbers):
    """Write float16 numbers into a tensor's first block, from byte `at` on."""
    raw, start = bytearray(path.read_bytes()), Gguf(path).tensors[name].start
    raw[start + at : start + at + 2 * len(numbers)] = np.array(numbers, np.float16).tobytes()
    path.write_bytes(raw)


@pytest.mark.parametrize("numbers", [[np.inf], [0.01, np.nan]])
@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K"])
def test_scales_and_minima_that_are_not_finite_are_refused(tmp_path, kind, numbers):
    path = tmp_path / "model.gguf"
    write_llama(path, kind, hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32)
    change_first(path, "blk.0.ffn_up.weight", 0, numbers)
    with pytest.raises(FormatError, match=r"up_proj.* not finite"):
        load_weights(path)


def test_scales_that_float16_cannot_hold_are_named(tmp_path):
    """Where a K-quant is joined with another type its scales, products of a float16 and an integer, become float16."""
    path, shape = tmp_path / "model.gguf", {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
    write_llama(path, "Q6_K", mixed={"blk.0.ffn_gate.weight": "Q8_0"}, head_dim=32, **shape)
    load_weights(path)
    change_first(path, "blk.0.ffn_up.weight", 208, [60000])
    with pytest.raises(FormatError, match=r"up_proj.*float16 ends at 65504"):
        load_weights(path)
    assert np.abs(load_weights(path, "float32").floats()["model.layers.0.mlp.up_proj.weight"]).max() > 65504


K_CODES = [code for code, kind in BLOCK_TYPES.items() if "_K" in kind.name]
INTEGER_CODES = [code for code, kind in BLOCK_TYPES.items() if not is_float(kind.format)]


@pytest.mark.parametrize(
    "code, group", [(code, group) for code in K_CODES for group in (16, 32) if group <= BLOCK_TYPES[code].group]
)
@pytest.mark.parametrize("other", INTEGER_CODES)
def test_k_quants_in_a_format_for_two(code, other, group):
    """The same weights, but for scales in float16 where the format is not nested."""
    kind, fmt = BLOCK_TYPES[code], common_format({BLOCK_TYPES[code].format, BLOCK_TYPES[other].format})
    raw = random_blocks(kind, np.random.default_rng(code), 6, 4)
    exact, joined = kind.floats(raw), convert(kind.weights(raw), fmt, group)
    assert joined.format == fmt and joined.group == group and is_nested(fmt) == (joined.units is not None)
    names = {kind.name, BLOCK_TYPES[other].name}
    six_bits_and_minimum = "Q6_K" in names and bool(names & {"Q2_K", "Q4_K", "Q5_K"})
    assert is_nested(fmt) == (other in K_CODES and not six_bits_and_minimum)
    if is_nested(fmt):
        assert np.array_equal(dequantize(joined), exact)
    else:
        assert np.linalg.norm(dequantize(joined) - exact) < 5e-4 * np.linalg.norm(exact)


def test_minima_that_float16_cannot_hold_are_refused():
    scales = np.full((32, 1), 600, np.float16)
    with pytest.raises(OverflowError, match="float16 ends at 65504"):
        convert(Quantized(np.zeros((32, 32), np.uint8), scales, None, 8), INT8_MIN, 32)
    units, integers = np.full((32, 1, 1), 9000, np.float16), np.ones((32, 16), np.int8)
    with pytest.raises(OverflowError, match="float16 ends at 65504"):
        convert(Quantized(np.zeros((32, 256), np.uint8), integers, None, 4, units), INT4K_MIN, 16)
    pairs = np.concatenate([units * np.float16(0.001), units], axis=2)
    with pytest.raises(OverflowError, match="float16 ends at 65504"):
        convert(Quantized(np.zeros((32, 256), np.uint8), integers, 8 * integers, 4, pairs), INT4_MIN, 16)


def test_not_finite_weights_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_llama(path, "F32")
    raw = bytearray(path.read_bytes())
    tensor_start = Gguf(path).tensors["blk.0.ffn_up.weight"].start
    raw[tensor_start : tensor_start + 4] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"up_proj.* not finite"):
        load_weights(path)
