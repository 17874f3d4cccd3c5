"""Hugging Face folders: what is read, and that everything else is refused by name."""

import json
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minilora.checkpoint import open_checkpoint
from minilora.config import ModelConfig
from minilora.errors import FormatError, MiniloraError, NotFoundError, UnsupportedError
from minilora_kernels.floats import narrow_bfloat16
from minilora_kernels.formats import BFLOAT16, FLOAT16, FLOAT32
from minilora_kernels.pack import COLUMNS, GROUP

from .support import BASE_CONFIG, load_weights, make_checkpoint


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert np.array_equal(one[name], other[name]), name


def test_shards_hold_the_same_model(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    one, three = make_checkpoint(tmp_path / "one"), make_checkpoint(tmp_path / "three", shards=3)
    assert_same(load_weights(one).floats(), load_weights(three).floats())


def test_a_single_file_counts_and_shards_beside_it_are_left_over(tmp_path):
    make_checkpoint(tmp_path, seed=1, shards=2)
    make_checkpoint(tmp_path, seed=2)
    assert_same(load_weights(tmp_path).floats(), load_file(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "llama-bias", "qwen3", "phi3"])
def test_packing_and_unpacking_change_nothing(tiny, name):
    stored = load_file(tiny(name) / "model.safetensors")
    floats = load_weights(tiny(name)).floats()
    for key, value in stored.items():
        assert np.array_equal(floats[key], value), key


@pytest.mark.parametrize("name, fmt", [("float16", FLOAT16), ("bfloat16", BFLOAT16), ("float32", FLOAT32)])
def test_stored_precision_is_kept(tmp_path, name, fmt):
    make_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if name == "bfloat16":
        write_bfloat16(path, tensors)
        expected = {k: (narrow_bfloat16(v).astype(np.uint32) << 16).view(np.float32) for k, v in tensors.items()}
    else:
        save_file({k: v.astype(name) for k, v in tensors.items()}, path)
        expected = {k: v.astype(name).astype(np.float32) for k, v in tensors.items()}
    weights = load_weights(tmp_path)
    assert weights.formats == (fmt,)
    assert_same(dict(sorted(weights.floats().items())), dict(sorted(expected.items())))


def write_bfloat16(path, tensors):
    """safetensors by hand: its NumPy side has no bfloat16."""
    header, data = {}, b""
    for name, value in tensors.items():
        raw = narrow_bfloat16(value).tobytes()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def removed(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def unknown(tensors):
    tensors["model.layers.0.mlp.experts.weight"] = np.zeros(3, np.float32)


def reshaped(tensors):
    tensors["model.norm.weight"] = np.zeros(65, np.float32)


def integers(tensors):
    tensors["model.norm.weight"] = np.zeros(64, np.int32)


def huge(tensors):
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 5] = 7e4


def infinite(tensors):
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 5] = np.inf


@pytest.mark.parametrize(
    "change, word",
    [
        (removed, "lacks.*up_proj"),
        (unknown, "experts"),
        (reshaped, "model.norm.weight.*65"),
        (integers, "I32"),
        (infinite, "v_proj.*not finite"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, word):
    make_checkpoint(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises((FormatError, UnsupportedError), match=word):
        load_weights(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_group_that_does_not_fit_becomes_the_next_smaller_one(tmp_path, dtype):
    make_checkpoint(tmp_path, num_attention_heads=3, num_key_value_heads=1, head_dim=48)
    weights = load_weights(tmp_path, dtype, 64)
    groups = {int(row[COLUMNS]): int(row[GROUP]) for row in weights.matrices}
    assert groups == {64: 64, 144: 16, 96: 32}


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_weights_that_are_too_large_for_a_dtype_are_named(tmp_path, dtype):
    make_checkpoint(tmp_path)
    change_tensors(tmp_path, huge)
    with pytest.raises(FormatError, match=r"o_proj.*numbers up to 70000"):
        load_weights(tmp_path, dtype)


def test_a_folder_of_gguf_files_names_them(tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(NotFoundError, match="GGUF files") as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "a.gguf") in caught.value.remedy


def test_missing_files_are_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedError, match="can run code"):
        open_checkpoint(tmp_path)
    with pytest.raises(NotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedError, match="folder that holds it and config"):
        open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "missing.safetensors"]
)
def test_s7_path_traversal_an_index_cannot_name_other_places(tmp_path, name):
    make_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises((FormatError, NotFoundError)):
        open_checkpoint(tmp_path)


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


F4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
MALFORMED = {
    "empty": b"",
    "too short": b"\x01\x02",
    "header longer than the file": safetensors(b"{}", length=1 << 40),
    "header of 2^64-1": safetensors(b"{}", length=(1 << 64) - 1),
    "not JSON": safetensors(b"{nope}"),
    "not UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "a list": safetensors(b"[1, 2]"),
    "offsets overlap": safetensors({"a": F4, "b": {**F4, "data_offsets": [8, 24]}}, bytes(24)),
    "a gap": safetensors({"a": F4, "b": {**F4, "data_offsets": [32, 48]}}, bytes(48)),
    "data cut short": safetensors({"a": F4}, bytes(8)),
    "trailing bytes": safetensors({"a": F4}, bytes(32)),
    "wrong size": safetensors({"a": {**F4, "shape": [5]}}, bytes(16)),
    "shape overflows": safetensors({"a": {**F4, "shape": [1 << 40, 1 << 40]}}, bytes(16)),
    "unknown dtype": safetensors({"a": {**F4, "dtype": "Q99"}}, bytes(16)),
    "negative offset": safetensors({"a": {**F4, "data_offsets": [-1, 15]}}, bytes(16)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_s3_safetensors_rules(tmp_path, name):
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(MALFORMED[name])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_checkpoint(tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_folders_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        folder.mkdir()
        make_checkpoint(folder)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (folder / f"{file}.good").write_bytes((folder / file).read_bytes())
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        raw = bytearray((folder / f"{file}.good").read_bytes())
        if data.draw(st.booleans()):
            for _ in range(data.draw(st.integers(1, 3))):
                raw[data.draw(st.integers(0, min(len(raw) - 1, 4000)))] = data.draw(st.integers(0, 255))
            raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
        (folder / file).write_bytes(raw)
    try:
        load_weights(folder)
        open_checkpoint(folder).tokenizer()
    except MiniloraError:
        pass


# ---------------------------------------------------------------- config.json


QWEN3, PHI3 = {"architectures": ["Qwen3ForCausalLM"]}, {"architectures": ["Phi3ForCausalLM"]}
BAD_CONFIGS = [
    ({"architectures": ["GPT2LMHeadModel"]}, UnsupportedError, "GPT2LMHeadModel"),
    ({"architectures": None, "model_type": "mamba"}, UnsupportedError, "mamba"),
    ({"hidden_act": "gelu"}, UnsupportedError, "gelu"),
    ({"logit_scale": 2.0}, UnsupportedError, "logit_scale"),
    ({"num_local_experts": 8}, UnsupportedError, "num_local_experts"),
    ({"quantization_config": {"bits": 4}}, UnsupportedError, "quantization_config"),
    ({"rope_scaling": {"rope_type": "su"}}, UnsupportedError, "su"),
    ({"rope_scaling": {"rope_type": "linear"}}, FormatError, "factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, FormatError, "factor"),
    ({"rope_scaling": 7}, FormatError, "rope scaling"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, UnsupportedError, "differ between layers"),
    ({"hidden_size": 0}, FormatError, "hidden_size"),
    ({"hidden_size": 65}, UnsupportedError, "hidden_size 65"),
    ({"hidden_size": True}, FormatError, "hidden_size"),
    ({"hidden_size": 1 << 60}, FormatError, "hidden_size"),
    ({"hidden_size": "64"}, FormatError, "hidden_size"),
    ({"head_dim": 20}, UnsupportedError, "head_dim 20"),
    ({"intermediate_size": 33}, UnsupportedError, "intermediate_size 33"),
    ({"num_key_value_heads": 3}, FormatError, "multiple"),
    ({"num_hidden_layers": -1}, FormatError, "num_hidden_layers"),
    ({"rms_norm_eps": -1.0}, FormatError, "rms_norm_eps"),
    ({**QWEN3, "layer_types": ["linear_attention", "full_attention"]}, UnsupportedError, "linear_attention"),
    ({**QWEN3, "layer_types": [["x"], "full_attention"]}, UnsupportedError, "layer type"),
    ({**QWEN3, "layer_types": ["full_attention"]}, FormatError, "layer_types"),
    ({**QWEN3, "layer_types": ["sliding_attention"] * 2, "sliding_window": 9}, FormatError, "no sliding_window is in"),
    ({**QWEN3, "max_window_layers": "a"}, FormatError, "max_window_layers"),
    ({"partial_rotary_factor": 0.5}, UnsupportedError, "rotates whole heads"),
    ({**PHI3, "partial_rotary_factor": 3.0}, FormatError, "partial_rotary_factor"),
    ({"rope_scaling": {"partial_rotary_factor": "x"}}, FormatError, "partial_rotary_factor"),
    ({"rope_scaling": {"rope_theta": "abc"}}, FormatError, "rope_theta"),
    ({"rope_theta": -3.0}, FormatError, "rope_theta"),
    ({"rope_theta": 10**400}, FormatError, "rope_theta"),
    ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, FormatError, "no finite frequencies"),
    ({"rope_scaling": {"rope_type": ["x"]}}, UnsupportedError, "unknown rope scaling"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [0.0] * 8}}, FormatError, "positive numbers in short"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": ["x"] * 8}}, FormatError, "positive numbers in short"),
    ({"architectures": [["x"]]}, FormatError, "architectures"),
    ({"eos_token_id": "2"}, FormatError, "eos_token_id"),
    ({"attention_bias": "yes"}, FormatError, "attention_bias"),
    ({"logit_scale": 0}, UnsupportedError, "logit_scale"),
    ({"interpolate_factor": 2}, UnsupportedError, "interpolate_factor"),
    ({"logit_scale": 0.0}, UnsupportedError, "logit_scale"),
]


@pytest.mark.parametrize("change, error, word", BAD_CONFIGS)
def test_bad_configs_are_refused(change, error, word):
    with pytest.raises(error, match=word):
        config = ModelConfig.from_dict({**BASE_CONFIG, **change})
        config.rope.tables(8)


@pytest.mark.parametrize(
    "scaling, reach",
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "longrope", "original_max_position_embeddings": 64}, 1024),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_how_far_positions_reach(scaling, reach):
    assert ModelConfig.from_dict({**BASE_CONFIG, "rope_scaling": scaling}).rope.reach == reach


def test_harmless_keys_pass():
    extra = {
        "torch_dtype": "float32",
        "transformers_version": "9",
        "use_cache": True,
        "auto_map": {"x": "y"},
        "unknown_flag": False,
        "other": None,
        "others": [],
        "temperature": 0.9,
        "max_length": 20,
        "max_sequence_length": 2048,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    }
    assert ModelConfig.from_dict({**BASE_CONFIG, **extra}) == ModelConfig.from_dict(BASE_CONFIG)


@pytest.mark.parametrize(
    "change, windows",
    [
        ({"architectures": ["MistralForCausalLM"]}, (4096, 4096)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (0, 0)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 9}, (0, 0)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            (0, 9),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (9, 0),
        ),
        ({**QWEN3, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, (9, 9)),
        (
            {
                "architectures": ["SmolLM3ForCausalLM"],
                "sliding_window": 9,
                "use_sliding_window": True,
                "no_rope_layers": [0, 1],
            },
            (9, 0),
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 9, "use_sliding_window": False}, (9, 9)),
        ({**PHI3, "sliding_window": 9, "layer_types": ["full_attention"] * 2}, (9, 9)),
        ({"sliding_window": 9, "use_sliding_window": True}, (0, 0)),
        ({}, (0, 0)),
    ],
)
def test_windows(change, windows):
    """As in transformers, whose classes look at different keys."""
    assert ModelConfig.from_dict({**BASE_CONFIG, **change}).windows == windows


def test_biases_only_where_the_architecture_has_them():
    """transformers' Mistral has none, whatever config.json says."""
    biases = {"attention_bias": True, "mlp_bias": True}
    found = [
        ModelConfig.from_dict({**BASE_CONFIG, **biases, "architectures": [name]})
        for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM")
    ]
    assert [(c.qkv_bias, c.o_bias, c.mlp_bias) for c in found] == [(True,) * 3, (True, True, False), (False,) * 3]


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_phi3_has_more_names_for_longrope(name):
    scaling = {"type": name, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    assert ModelConfig.from_dict({**BASE_CONFIG, **PHI3, "rope_scaling": scaling}).rope.kind == "longrope"
