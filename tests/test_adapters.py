"""PEFT folders: what is read, that everything else is refused by name, and the pool of resident adapters."""

import json
import os
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.numpy import load_file

from minilora.adapter_pool import AdapterPool
from minilora.adapters import Adapter, Pair, pack_adapter
from minilora.config import ModelConfig
from minilora.errors import AdapterError, FormatError, MiniloraError, NotFoundError, ResourceError, UnsupportedError
from minilora.peft import TENSORS, adapter_settings, load_adapter, open_tensors
from minilora_kernels.formats import FLOAT16, FLOAT32, INT8

from .support import BASE_CONFIG, load_weights, make_adapter, peft_tensors, save_adapter

CONFIG = ModelConfig.from_dict(BASE_CONFIG)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def test_scaling_is_alpha_over_rank(tmp_path):
    adapter = load_adapter(save_adapter(tmp_path, CONFIG, rank=4, lora_alpha=12), CONFIG)
    tensors = peft_tensors(CONFIG, 4, ("q_proj", "v_proj"), 1)
    a, b = adapter.pairs["model.layers.0.self_attn.q_proj"]
    assert np.array_equal(a, tensors[f"{Q0}.lora_A.weight"])
    assert np.array_equal(b, tensors[f"{Q0}.lora_B.weight"] * np.float32(3))
    assert adapter.rank == 4 and adapter.modules == ["q_proj", "v_proj"]


def test_rank_and_alpha_patterns(tmp_path):
    tensors = peft_tensors(CONFIG, 4, ("v_proj",), 1) | peft_tensors(CONFIG, 7, ("q_proj",), 2)
    folder = save_adapter(
        tmp_path,
        CONFIG,
        rank=4,
        tensors=tensors,
        rank_pattern={"q_proj": 7},
        alpha_pattern={r"layers.1.self_attn.v_proj": 40},
        use_rslora=True,
    )
    pairs = load_adapter(folder, CONFIG).pairs
    assert len(pairs["model.layers.0.self_attn.q_proj"].a) == 7
    v = [
        pairs[f"model.layers.{i}.self_attn.v_proj"].b
        / tensors[f"base_model.model.model.layers.{i}.self_attn.v_proj.lora_B.weight"]
        for i in (0, 1)
    ]
    assert np.allclose(v[0], 8 / 2) and np.allclose(v[1], 40 / 2)


def test_layers_to_transform(tmp_path):
    tensors = {k: v for k, v in peft_tensors(CONFIG, 4, ("q_proj", "v_proj"), 1).items() if ".layers.1." in k}
    folder = save_adapter(tmp_path, CONFIG, tensors=tensors, layers_to_transform=[1])
    assert load_adapter(folder, CONFIG).pairs.keys() == {f"model.layers.1.self_attn.{x}_proj" for x in "qv"}


TARGETS = [
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": ["o_proj"]},
    {"target_modules": ["q_proj", "v_proj", "o_proj"], "exclude_modules": r".*\.o_proj"},
    {"target_modules": ["q_proj", "v_proj", "lm_head"], "layers_to_transform": [0, 1]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("settings", TARGETS, ids=repr)
def test_targets_are_found_as_peft_finds_them(tmp_path, settings):
    """Of q_proj and v_proj everything is there; leave one out and it is missed, however it is named."""
    tensors = peft_tensors(CONFIG, 4, ("q_proj", "v_proj"), 1)
    assert len(load_adapter(save_adapter(tmp_path, CONFIG, tensors=tensors, **settings), CONFIG).pairs) == 4
    some = {name: tensor for name, tensor in tensors.items() if not name.startswith(Q0)}
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj.*missing"):
        load_adapter(save_adapter(tmp_path, CONFIG, tensors=some, **settings), CONFIG)


def test_an_adapter_of_another_base_model_is_refused():
    """However it was made: one that was read for a deeper or wider model fits no other."""
    for change, word in (({"num_hidden_layers": 3}, "layers.2"), ({"hidden_size": 128}, r"B \(128, 4\)")):
        foreign = make_adapter(ModelConfig.from_dict(BASE_CONFIG | change))
        with pytest.raises(AdapterError, match=word):
            pack_adapter(foreign, CONFIG, FLOAT16)


def test_the_digest_is_of_the_content(tmp_path):
    def digest(name, seed, **settings):
        adapter = load_adapter(save_adapter(tmp_path / name, CONFIG, seed=seed, **settings), CONFIG)
        return pack_adapter(adapter, CONFIG, FLOAT16).digest

    assert digest("a", 1) == digest("b", 1)
    assert len({digest("a", 1), digest("c", 2), digest("d", 1, lora_alpha=9), digest("e", 1, rank=8)}) == 4


@pytest.mark.parametrize("modules", [("q_proj", "down_proj"), ("embed_tokens", "lm_head")])
def test_int8_keeps_every_rank_however_a_and_b_share_its_size(modules):
    """As adapters that were joined with weights have it: B A is the same."""
    even = make_adapter(CONFIG, modules=modules)
    shares = np.exp2(np.arange(4) * 3 - 5).astype(np.float32)
    uneven = Adapter({name: Pair(a * shares[:, None], b / shares) for name, (a, b) in even.pairs.items()})
    assert pack_adapter(uneven, CONFIG, INT8).digest == pack_adapter(even, CONFIG, INT8).digest
    assert pack_adapter(uneven, CONFIG, FLOAT32).digest != pack_adapter(even, CONFIG, FLOAT32).digest


def test_a_rank_that_gives_nothing_costs_the_others_nothing():
    """Where a rank's A is 0, its part of B does not count, however large."""
    adapter = make_adapter(CONFIG, modules=("q_proj",))
    for pair in adapter.pairs.values():
        pair.a[0] = 0
    without = pack_adapter(adapter, CONFIG, INT8)
    for pair in adapter.pairs.values():
        pair.b[:, 0] = 1e6
    assert pack_adapter(adapter, CONFIG, INT8).digest == without.digest


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path):
    """What was opened is read; a mapped file would end the process."""
    folder = save_adapter(tmp_path, CONFIG)
    expected, file = open_tensors(folder), open_tensors(folder)
    os.truncate(folder / TENSORS, 100)
    for name in expected.tensors:
        assert np.array_equal(file.read(name), expected.read(name))


def test_patterns_of_a_stranger_hold_up_nobody(tmp_path):
    folder = save_adapter(tmp_path, CONFIG, rank_pattern={"(..|.|...)*zz": 3}, target_modules=".*" * 12 + "zz")
    started = time.process_time()
    load_adapter(folder, CONFIG)
    assert time.process_time() - started < 1


def test_numbers_too_large_for_float16_are_refused():
    adapter = make_adapter(CONFIG)
    next(iter(adapter.pairs.values())).b[0, 0] = 70000
    with pytest.raises(AdapterError, match="65504"):
        pack_adapter(adapter, CONFIG, FLOAT16)
    pack_adapter(adapter, CONFIG, FLOAT32)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("half", ["a", "b"])
def test_numbers_that_are_not_finite_are_refused(half, bad):
    """In int8, NaN would become 0."""
    pairs = make_adapter(CONFIG, modules=("up_proj",)).pairs
    getattr(pairs["model.layers.1.mlp.up_proj"], half)[3, 2] = bad
    with pytest.raises(AdapterError, match=f"layers.1.mlp.up_proj: lora_{half.upper()}.*not finite"):
        Adapter(pairs)


BAD_SETTINGS = [
    ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
    ({"use_dora": True}, UnsupportedError, "DoRA"),
    ({"bias": "all"}, UnsupportedError, "bias"),
    ({"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save"),
    ({"fan_in_fan_out": True}, UnsupportedError, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "pissa"),
    ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices"),
    ({"alora_invocation_tokens": [1]}, UnsupportedError, "alora"),
    ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
    ({"new_scale": 0}, UnsupportedError, "new_scale"),
    ({"r": 0}, AdapterError, "r must be"),
    ({"r": 10**9}, AdapterError, "r must be"),
    ({"r": 8}, AdapterError, "q_proj.*rank 8"),
    ({"r": "4"}, AdapterError, "r must be"),
    ({"lora_alpha": float("inf")}, AdapterError, "lora_alpha"),
    ({"lora_alpha": None}, AdapterError, "lora_alpha"),
    ({"lora_alpha": 10**400}, AdapterError, "lora_alpha"),
    ({"rank_pattern": {"q_proj{2}": 3}}, AdapterError, "pattern"),
    ({"rank_pattern": {"q_proj(": 3}}, AdapterError, "pattern"),
    ({"alpha_pattern": [1]}, AdapterError, "alpha_pattern"),
    ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, AdapterError, "o_proj.*missing"),
    ({"target_modules": ["w1", "w2"]}, AdapterError, "w1, w2, none of which"),
    ({"target_modules": 5}, AdapterError, "target_modules"),
    ({"exclude_modules": [5]}, AdapterError, "exclude_modules"),
]


@pytest.mark.parametrize("change, error, word", BAD_SETTINGS)
def test_bad_settings_are_refused(tmp_path, change, error, word):
    with pytest.raises(error, match=word):
        load_adapter(save_adapter(tmp_path, CONFIG, **change), CONFIG)


def test_registering_refuses_what_reading_would(tmp_path):
    for change in ({"use_dora": True}, {"r": 0}, {"rank_pattern": {"q_proj(": 3}}):
        with pytest.raises((AdapterError, UnsupportedError), match=next(iter(change))):
            adapter_settings(save_adapter(tmp_path, CONFIG, **change))


def test_rank_and_alpha_have_pefts_defaults(tmp_path):
    folder = save_adapter(tmp_path, CONFIG, rank=8)
    data = json.loads((folder / "adapter_config.json").read_text())
    del data["r"], data["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(data))
    assert load_adapter(folder, CONFIG).rank == adapter_settings(folder)["r"] == 8
    assert adapter_settings(folder)["lora_alpha"] == 8


def test_targets_that_only_other_models_have_pass(tmp_path):
    """As PEFT: one of the names must mean a module here."""
    folder = save_adapter(tmp_path, CONFIG, target_modules=["q_proj", "v_proj", "c_attn", "query_key_value"])
    assert load_adapter(folder, CONFIG).modules == ["q_proj", "v_proj"]


def without(name):
    return lambda t: {k: v for k, v in t.items() if k != name}


def with_(name, value):
    return lambda t: t | {name: value}


BAD_TENSORS = [
    (without(f"{Q0}.lora_B.weight"), AdapterError, "q_proj: lora_B is missing"),
    (with_(f"{Q0}.lora_A.weight", np.zeros((4, 65), np.float32)), AdapterError, r"q_proj: lora_A.*\(4, 65\)"),
    (with_(f"{Q0}.lora_B.weight", np.zeros((63, 4), np.float32)), AdapterError, r"q_proj: lora_B.*\(63, 4\)"),
    (with_(f"{Q0}.lora_A.weight", np.full((4, 64), np.nan, np.float32)), AdapterError, "not finite"),
    (with_(f"{Q0}.lora_magnitude_vector", np.zeros(64, np.float32)), UnsupportedError, "DoRA"),
    (with_("base_model.model.lm_head.weight", np.zeros((263, 64), np.float32)), UnsupportedError, "lm_head.weight"),
    (
        with_("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", np.zeros((4, 64), np.float32)),
        AdapterError,
        "layers.7",
    ),
    (
        with_("base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight", np.zeros((4, 64), np.float32)),
        AdapterError,
        "qkv_proj",
    ),
    (
        with_("base_model.model.model.embed_tokens.lora_A.weight", np.zeros((4, 263), np.float32)),
        AdapterError,
        "embed_tokens",
    ),
    (lambda t: {}, AdapterError, "no tensors"),
]


@pytest.mark.parametrize("change, error, word", BAD_TENSORS)
def test_bad_tensors_are_refused(tmp_path, change, error, word):
    tensors = change(peft_tensors(CONFIG, 4, ("q_proj", "v_proj"), 1))
    with pytest.raises(error, match=word):
        load_adapter(save_adapter(tmp_path, CONFIG, tensors=tensors), CONFIG)


def test_copies_of_the_base_are_compared(tmp_path, tiny):
    """PEFT saves the base's own embedding and head beside adapters of them."""
    weights = load_weights(tiny("llama"), "int4")
    head = "base_model.model.lm_head"
    tensors = peft_tensors(CONFIG, 4, ("lm_head",), 1) | {
        f"{head}.base_layer.weight": load_file(tiny("llama") / "model.safetensors")["lm_head.weight"]
    }
    folder = save_adapter(tmp_path, CONFIG, modules=("lm_head",), tensors=tensors)
    assert list(load_adapter(folder, CONFIG, weights).pairs) == ["lm_head"]
    tensors[f"{head}.base_layer.weight"] = np.roll(tensors[f"{head}.base_layer.weight"], 1, axis=0)
    with pytest.raises(AdapterError, match="not the base model's own"):
        load_adapter(save_adapter(tmp_path, CONFIG, modules=("lm_head",), tensors=tensors), CONFIG, weights)
    tensors[f"{head}.base_layer.weight"] = np.zeros((9, 64), np.float32)
    with pytest.raises(AdapterError, match="another base model"):
        load_adapter(save_adapter(tmp_path, CONFIG, modules=("lm_head",), tensors=tensors), CONFIG, weights)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="not a folder"):
        load_adapter(tmp_path / "nowhere", CONFIG)
    with pytest.raises(NotFoundError, match=r"adapter_config\.json"):
        load_adapter(tmp_path, CONFIG)
    save_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="safe_serialization"):
        load_adapter(tmp_path, CONFIG)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(FormatError):
        load_adapter(tmp_path, CONFIG)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_folders_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "adapter"
    save_adapter(folder, CONFIG)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        raw = bytearray((folder / file).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            raw[data.draw(st.integers(0, min(len(raw) - 1, 3000)))] = data.draw(st.integers(0, 255))
        (folder / file).write_bytes(raw)
    with suppress(MiniloraError):
        load_adapter(folder, CONFIG)


def test_unknown_json_types_never_crash(tmp_path):
    for key in (
        "r",
        "lora_alpha",
        "target_modules",
        "rank_pattern",
        "layers_to_transform",
        "bias",
        "peft_type",
        "init_lora_weights",
    ):
        for value in (None, True, -1, 1.5, "x", [], [None], {}, {"a": []}):
            folder = save_adapter(tmp_path, CONFIG)
            content = json.loads((folder / "adapter_config.json").read_text()) | {key: value}
            (folder / "adapter_config.json").write_text(json.dumps(content))
            with suppress(MiniloraError):
                load_adapter(folder, CONFIG)


# ---------------------------------------------------------------- the pool


class PoolMachine(RuleBasedStateMachine):
    """Random operations; after each the books must be right and every resident adapter's bytes intact."""

    def __init__(self):
        super().__init__()
        adapters = [
            make_adapter(CONFIG, rank=rank, seed=rank, modules=("q_proj", "embed_tokens")[: 1 + rank % 2])
            for rank in (1, 4, 8, 20, 33)
        ]
        packed = [pack_adapter(adapter, CONFIG, FLOAT16) for adapter in adapters]
        self.digests = [p.digest for p in packed]
        self.packed = {p.digest: p for p in packed}
        self.pool = AdapterPool(CONFIG, 3, 2 * max(len(p.data) for p in packed))
        self.users = dict.fromkeys(self.packed, 0)

    @rule(i=st.integers(0, 4))
    def insert(self, i):
        digest = self.digests[i]
        if self.pool.insert(digest, self.packed[digest]):
            assert digest in self.pool
        else:
            assert any(self.users.values())

    @rule(i=st.integers(0, 4))
    def acquire(self, i):
        digest = self.digests[i]
        if digest in self.pool:
            self.pool.acquire(digest)
            self.users[digest] += 1

    @precondition(lambda self: any(self.users.values()))
    @rule(i=st.integers(0, 4))
    def release(self, i):
        digest = [d for d, count in self.users.items() if count][i % sum(map(bool, self.users.values()))]
        self.pool.release(digest)
        self.users[digest] -= 1

    @rule(i=st.integers(0, 4))
    def remove(self, i):
        digest = self.digests[i]
        expected = digest in self.pool and not self.users[digest]
        assert self.pool.remove(digest) == expected

    @invariant()
    def intact(self):
        self.pool.check_integrity()
        for digest, packed in self.packed.items():
            if self.users[digest]:
                assert digest in self.pool, "an adapter in use was evicted"
            if digest in self.pool:
                n, arrays = self.pool.number(digest), self.pool.arrays
                first = (
                    arrays.inputs[n][packed.inputs[..., 1] > 0][0, 0] - packed.inputs[packed.inputs[..., 1] > 0][0, 0]
                )
                assert np.array_equal(arrays.arena[first : first + len(packed.data)], packed.data)
                assert np.array_equal(
                    arrays.outputs[n][..., 0], np.where(packed.outputs[..., 1] > 0, packed.outputs[..., 0] + first, 0)
                )
                moved = [first, first, 0] if packed.embed[2] else [0, 0, 0]
                assert (arrays.embed[n] - packed.embed).tolist() == moved


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def test_what_can_never_fit_is_refused():
    pool = AdapterPool(CONFIG, 2, 1000)
    adapter = make_adapter(CONFIG, rank=8)
    with pytest.raises(ResourceError, match="larger than the whole pool"):
        pool.insert("digest", pack_adapter(adapter, CONFIG, FLOAT16))
