"""Memory nodes, simulated on one: threads bound, weights copied or spread, and the same bits."""

import os
from pathlib import Path

import numpy as np
import pytest

from minilora import numa
from minilora.errors import ResourceError, UnsupportedError, UsageError
from minilora.numa import Node, assign, copy_to, nodes, spread
from minilora.params import EngineConfig
from minilora.sequence import AdapterUse
from minilora_kernels.team import Each

from .support import make_adapter, make_engine, prompt_logits, random_tokens

MAPS = Path("/proc/self/numa_maps")

pytestmark = pytest.mark.skipif(not numa._SYSTEM.is_dir(), reason="this system does not report NUMA nodes")


@pytest.fixture
def two_nodes(monkeypatch):
    """A machine of two nodes: this one's cores in two parts, its first node's memory behind both."""
    cpus, [real, *_] = sorted(os.sched_getaffinity(0)), nodes()
    half = max(1, len(cpus) // 2)
    found = [Node(real.number, frozenset(cpus[:half])), Node(real.number, frozenset(cpus[-half:]))]
    monkeypatch.setattr(numa, "nodes", lambda: found)
    return found


def test_the_nodes_of_this_machine():
    found = nodes()
    assert set().union(*(node.cpus for node in found)) == os.sched_getaffinity(0)
    assert len({node.number for node in found}) == len(found)


def test_lists_of_cores(tmp_path, monkeypatch):
    for number, cpus in ((0, "0-1,4"), (1, "2-3"), (10, "5000"), (2, "")):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "cpulist").write_text(cpus + "\n")
    monkeypatch.setattr(numa, "_SYSTEM", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert nodes() == [Node(0, frozenset({0, 1})), Node(1, frozenset({2, 3}))]


def test_a_system_without_nodes_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "_SYSTEM", tmp_path / "missing")
    with pytest.raises(UnsupportedError, match="NUMA nodes\nUse numa='off'"):
        nodes()


def test_threads_are_shared_out_by_cores():
    big, small = Node(0, frozenset(range(6))), Node(1, frozenset({6, 7}))
    assert assign(8, [big, small]) == [big] * 6 + [small] * 2
    assert assign(4, [big, small]) == [big] * 3 + [small]
    assert assign(1, [big, small]) == [big]


def test_memory_is_placed_and_keeps_its_content():
    found, data = nodes(), np.arange(100_003, dtype=np.uint8)
    copy = copy_to(data, found)
    assert np.array_equal(copy, data) and copy.flags.writeable and copy.base is not data
    fresh = np.zeros(1 << 20, np.float32)
    spread(fresh, found)
    assert not fresh.any()


@pytest.mark.skipif(not MAPS.exists(), reason="this system tells nothing of memory policies")
def test_the_system_knows_where_memory_is_to_lie():
    [node, *_] = nodes()
    fresh, copy = np.zeros(1 << 22, np.uint8), copy_to(np.arange(1 << 22, dtype=np.uint8), [node])
    spread(fresh, [node])
    assert policy(fresh) == f"interleave:{node.number}" and policy(copy) == f"prefer:{node.number}"


def policy(array):
    """The policy of the memory in the middle of an array."""
    middle = array.ctypes.data + array.nbytes // 2
    lines = [line.split() for line in MAPS.read_text().splitlines()]
    return [found for start, found, *_ in lines if int(start, 16) <= middle][-1]


def test_a_node_that_is_not_there():
    with pytest.raises(ResourceError, match="placed on nodes"):
        spread(np.zeros(1 << 20, np.uint8), [Node(63, frozenset({0}))])


@pytest.mark.parametrize("mode", ["interleave", "replicate"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_on_nodes(tiny, two_nodes, mode, threads):
    tokens, found = random_tokens(np.random.default_rng(5), 40), []
    for settings in ({"threads": 2}, {"threads": threads, "numa": mode}):
        engine = make_engine(tiny(), dtype="int8", **settings)
        version = engine.add_adapter(make_adapter(engine.model))
        found.append(prompt_logits(engine, tokens, (AdapterUse(version, 1.0),)))
        if "numa" in settings:
            check_places(engine.runner, mode, two_nodes)
        engine.close()
    assert found[0] == found[1]


def check_places(runner, mode, found):
    size = runner.team.size
    fixed = runner._fixed if isinstance(runner._fixed, Each) else [runner._fixed]
    arenas = {each.w.arena.ctypes.data for each in fixed}
    assert runner.weights.arena.ctypes.data not in arenas, "the mapped file stays where it is"
    assert len(arenas) == (min(size, 2) if mode == "replicate" else 1)
    assert runner.team._cpus == [node.cpus for node in assign(size, found)]
    assert os.sched_getaffinity(0) == set().union(*(node.cpus for node in found)), "the caller is free again"


def test_too_little_memory_for_copies(tiny, two_nodes, monkeypatch):
    monkeypatch.setattr("minilora.runner.free_memory", lambda: 100_000)
    with pytest.raises(ResourceError, match="copies"):
        make_engine(tiny(), numa="replicate", threads=2, kv_cache_memory=1 << 20, lora_memory=1 << 16)


def test_unknown_modes():
    with pytest.raises(UsageError, match="interleave"):
        EngineConfig(numa="both")
