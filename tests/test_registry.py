"""Names and versions of adapters, the disk tier, and what is counted."""

import json
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minilora.adapter_pool import AdapterPool
from minilora.adapters import pack_adapter
from minilora.config import ModelConfig
from minilora.errors import AdapterError, FormatError, NotFoundError, ResourceError, UsageError
from minilora.peft import load_adapter
from minilora.registry import AHEAD, AdapterRegistry
from minilora_kernels.formats import FLOAT16

from .support import BASE_CONFIG, make_adapter, peft_tensors, save_adapter

CONFIG = ModelConfig.from_dict(BASE_CONFIG)
SIZE = len(pack_adapter(make_adapter(CONFIG, rank=4, modules=("q_proj", "v_proj")), CONFIG, FLOAT16).data)


class Store:
    """A registry over real folders; `gate` holds the background thread back while it is cleared."""

    def __init__(self, room=4, slots=8, used=None, highest_rank=16):
        self.gate, self.news, self.reads = threading.Event(), threading.Event(), []
        self.gate.set()
        pool = AdapterPool(CONFIG, slots, room * SIZE, FLOAT16, used)
        self.registry = AdapterRegistry(
            pool, highest_rank, self.read, lambda a: pack_adapter(a, CONFIG, FLOAT16), self.news.set
        )

    def read(self, folder):
        self.gate.wait(10)
        self.reads.append(folder.name)
        return load_adapter(folder, CONFIG)

    def settle(self):
        """Until nothing is being read."""
        deadline = time.monotonic() + 20
        while self.registry.loading:
            assert time.monotonic() < deadline, "the background thread does not answer"
            self.registry.collect()
            time.sleep(0.001)

    def start(self, *versions):
        """A request with these adapters, from submission to its start."""
        self.registry.enter(versions)
        while not self.registry.is_ready(versions):
            self.settle()
        assert self.registry.acquire(versions)
        self.registry.check_integrity()

    def end(self, *versions):
        self.registry.release(versions)
        self.registry.leave(versions)
        self.registry.check_integrity()


@pytest.fixture
def folders(tmp_path):
    return [save_adapter(tmp_path / f"a{i}", CONFIG, seed=i) for i in range(8)]


@pytest.fixture
def store():
    store = Store()
    yield store
    store.gate.set()
    store.registry.close()


def test_registering_reads_no_weights(store, folders):
    for i in range(1000):
        store.registry.add(f"tenant-{i}", folders[i % 8])
    assert not store.reads and store.registry.pool.used == 0 and not store.registry.loading


def test_read_once_used_often(store, folders):
    version = store.registry.add("a", folders[0])
    for _ in range(5):
        store.start(version)
        store.end(version)
    assert store.reads == ["a0"] and store.registry.pool.hits == 4
    assert store.registry.counts.loads == 1 and store.registry.counts.load_seconds > 0
    assert store.registry.counts.swap_seconds > 0
    assert version.packed is None, "the pool's copy is the only one"


def test_names_of_one_content_keep_one_copy(store, folders):
    versions = [store.registry.add(f"a{i}", folders[0]) for i in range(6)]
    for version in versions:
        store.start(version)
    assert len(store.registry.pool) == 1 and all(version.packed is None for version in versions)
    assert store.registry._outstanding == 0, "what is read ahead is not held up"
    for version in versions:
        store.end(version)


@pytest.mark.parametrize(("used", "evicted"), [((0, 1, 0, 2), 1), ((0, 0, 1, 2), 0)])
def test_evicted_by_bytes_least_recently_used(folders, used, evicted):
    store = Store(room=2)
    versions = [store.registry.add(f"a{i}", folders[i]) for i in range(3)]
    for i in used:
        store.start(versions[i])
        store.end(versions[i])
    assert [v for v in versions if v.digest not in store.registry.pool] == [versions[evicted]]
    assert store.registry.pool.evictions == 1
    store.start(versions[evicted])
    assert store.reads == ["a0", "a1", "a2", f"a{evicted}"]
    store.end(versions[evicted])
    store.registry.close()


def test_resident_adapters_count_when_they_are_used(folders):
    store = Store(used=1)
    one, other = (store.registry.add(f"a{i}", folders[i]) for i in range(2))
    for version in (one, other):
        store.start(version)
        store.end(version)
    store.start(one)
    store.registry.enter([other])
    assert store.registry.is_ready([other]) and not store.registry.acquire([other]), "one may be used at once"
    store.registry.close()


def test_never_evicted_while_in_use(folders):
    store = Store(room=2)
    versions = [store.registry.add(f"a{i}", folders[i]) for i in range(3)]
    store.start(versions[0])
    store.start(versions[1])
    store.registry.enter([versions[2]])
    while not store.registry.is_ready([versions[2]]):
        store.settle()
    assert not store.registry.acquire([versions[2]])
    assert versions[0].digest in store.registry.pool and versions[1].digest in store.registry.pool
    store.end(versions[0])
    assert store.registry.acquire([versions[2]])
    store.registry.close()


def test_nothing_is_evicted_in_vain(folders):
    """A request that lacks room leaves what is resident to those who can use it."""
    store = Store(room=3)
    one, other, resident, *wanted = (store.registry.add(f"a{i}", folders[i]) for i in range(5))
    store.start(resident)
    store.end(resident)
    store.start(one)
    store.start(other)
    store.registry.enter(wanted)
    while not store.registry.is_ready(wanted):
        store.settle()
    for _ in range(3):
        assert not store.registry.acquire(wanted), "there is room for one of the two"
    assert resident.digest in store.registry.pool and store.registry.pool.evictions == 0
    store.end(one)
    assert store.registry.acquire(wanted) and store.registry.pool.evictions == 2
    store.registry.check_integrity()
    store.registry.close()


def test_an_adapter_is_not_evicted_for_another_of_its_own_request(folders):
    """The second one is resident and unused when the first needs its room: the stranger goes."""
    store = Store(room=2)
    second, stranger, first = (store.registry.add(f"a{i}", folders[i]) for i in range(3))
    for version in (second, stranger):
        store.start(version)
        store.end(version)
    store.registry.enter([first, second])
    store.registry.is_ready([first, second])
    store.settle()
    # Between being found ready and its start, another request touches the stranger.
    store.registry.is_ready([stranger])
    assert store.registry.acquire([first, second])
    assert stranger.digest not in store.registry.pool
    store.end(first, second)
    store.registry.close()


def test_a_request_that_does_not_start_holds_nothing(folders):
    store = Store(room=2)
    running, first, second = (store.registry.add(f"a{i}", folders[i]) for i in range(3))
    store.start(running)
    store.registry.enter([first, second])
    while not store.registry.is_ready([first, second]):
        store.settle()
    assert not store.registry.acquire([first, second])
    store.registry.pool.check_references({running.digest: 1})
    store.end(running)
    while not store.registry.is_ready([first, second]):
        store.settle()
    assert store.registry.acquire([first, second])
    store.end(first, second)
    store.registry.close()


def test_reading_ahead_is_bounded(store, folders):
    store.gate.clear()
    versions = [store.registry.add(f"a{i}", folders[i]) for i in range(8)]
    for version in versions:
        store.registry.enter([version])
        store.registry.is_ready([version], urgent=False)
    assert sum(version.loading for version in versions) == AHEAD
    assert not store.registry.is_ready([versions[7]]) and versions[7].loading, "urgent ones are read all the same"
    store.gate.set()
    store.settle()
    store.registry.check_integrity()


def test_replacing_keeps_the_old_version_for_its_users(store, folders):
    old = store.registry.add("a", folders[0])
    store.start(old)
    new = store.registry.add("a", folders[1])
    assert store.registry.get("a") is new and old.retired
    store.start(new)
    assert old.digest != new.digest and {old.digest, new.digest} <= {
        d for d in (old.digest, new.digest) if d in store.registry.pool
    }
    store.end(old)
    assert old.digest not in store.registry.pool, "its bytes went with its last user"
    assert new.digest in store.registry.pool
    store.end(new)


def test_replacing_by_equal_content_keeps_the_bytes(store, folders):
    old = store.registry.add("a", folders[0])
    store.start(old)
    new = store.registry.add("a", folders[0])
    store.start(new)
    store.end(old)
    assert new.digest in store.registry.pool
    store.end(new)


def test_unloading(store, folders):
    version = store.registry.add("a", folders[0])
    store.start(version)
    store.registry.remove("a")
    with pytest.raises(NotFoundError):
        store.registry.get("a")
    assert version.digest in store.registry.pool, "its request goes on"
    store.end(version)
    assert store.registry.pool.used == 0
    with pytest.raises(NotFoundError):
        store.registry.remove("a")


def test_unloading_while_it_is_read(store, folders):
    store.gate.clear()
    version = store.registry.add("a", folders[0])
    store.registry.enter([version])
    assert not store.registry.is_ready([version])
    store.registry.remove("a")
    store.registry.leave([version])
    store.gate.set()
    store.settle()
    store.registry.check_integrity()
    assert version.packed is None and store.registry.pool.used == 0


def cancelled_while_it_is_read(store, folder):
    """The version of an adapter whose only request left before it was read."""
    store.gate.clear()
    version = store.registry.add("a", folder)
    store.registry.enter([version])
    store.registry.is_ready([version])
    store.registry.leave([version])
    store.gate.set()
    store.settle()
    return version


def test_cancelled_while_it_is_read_leaves_no_bytes_behind(store, folders):
    version = cancelled_while_it_is_read(store, folders[0])
    assert version.packed is None
    store.start(version)
    store.end(version)


def test_arrays_stay_in_memory_and_come_back(folders):
    store = Store(room=1)
    version = store.registry.add("arrays", make_adapter(CONFIG, rank=4, modules=("q_proj", "v_proj"), seed=9))
    other = store.registry.add("folder", folders[0])
    for one in (version, other, version):
        store.start(one)
        store.end(one)
    assert store.registry.pool.evictions == 2 and store.reads == ["a0"]
    store.registry.close()


def test_a_broken_folder_is_one_requests_trouble(store, folders):
    (folders[0] / "adapter_model.safetensors").write_bytes(b"nonsense")
    bad, good = store.registry.add("bad", folders[0]), store.registry.add("good", folders[1])
    store.start(good)
    for _ in range(2):
        store.registry.enter([bad])
        with pytest.raises(FormatError):
            while not store.registry.is_ready([bad]):
                store.settle()
        store.registry.leave([bad])
    assert store.reads.count("a0") == 2, "it is tried again for a new request"
    shutil.copytree(folders[2], folders[0], dirs_exist_ok=True)
    store.start(bad)
    store.end(bad)
    store.end(good)
    assert store.registry.counts.failures == 2


def test_an_error_that_nobody_waited_for_is_not_the_next_requests(store, folders):
    (folders[0] / "adapter_model.safetensors").write_bytes(b"nonsense")
    version = cancelled_while_it_is_read(store, folders[0])
    assert store.registry.counts.failures == 1
    shutil.copytree(folders[2], folders[0], dirs_exist_ok=True)
    store.start(version)
    store.end(version)


@pytest.mark.parametrize("damage", ["missing", "no config", "rank", 0.0, float("inf")])
def test_what_cannot_be_registered_changes_nothing(store, folders, damage):
    known = store.registry.add("a", folders[1])
    weight = 1.0
    if damage == "missing":
        shutil.rmtree(folders[0])
    elif damage == "no config":
        (folders[0] / "adapter_config.json").unlink()
    elif damage == "rank":
        content = json.loads((folders[0] / "adapter_config.json").read_text())
        (folders[0] / "adapter_config.json").write_text(json.dumps(content | {"r": 64}))
    else:
        weight = damage
    with pytest.raises((NotFoundError, UsageError)):
        store.registry.add("a", folders[0], weight)
    assert store.registry.get("a") is known
    store.registry.check_integrity()


def test_a_rank_that_only_the_tensors_show_is_refused_when_they_are_read(store, tmp_path):
    tensors = peft_tensors(CONFIG, 4, ("v_proj",), 1) | peft_tensors(CONFIG, 20, ("q_proj",), 1)
    version = store.registry.add("a", save_adapter(tmp_path, CONFIG, tensors=tensors, rank_pattern={"q_proj": 20}))
    store.registry.enter([version])
    with pytest.raises(UsageError, match="rank 20, but max_lora_rank is 16"):
        while not store.registry.is_ready([version]):
            store.settle()
    store.registry.leave([version])


def test_files_that_change_without_a_word_are_noticed(folders):
    store = Store(room=1)
    version, other = store.registry.add("a", folders[0]), store.registry.add("b", folders[1])
    store.start(version)
    store.end(version)
    store.start(other)
    store.end(other)
    shutil.copytree(folders[2], folders[0], dirs_exist_ok=True)
    store.registry.enter([version])
    with pytest.raises(AdapterError, match="have changed"):
        while not store.registry.is_ready([version]):
            store.settle()
    store.registry.leave([version])
    store.registry.close()


def test_too_large_and_too_many(folders):
    store = Store(room=1, used=2)
    big = make_adapter(CONFIG, rank=16)
    with pytest.raises(ResourceError, match="larger than the whole pool"):
        store.registry.add("big", big)
    assert not store.registry.names
    pair = [store.registry.add(f"a{i}", folders[i]) for i in range(2)]
    store.registry.enter(pair)
    while not store.registry.is_ready(pair):
        store.settle()
    with pytest.raises(ResourceError, match="of one request"):
        store.registry.acquire(pair)
    store.registry.leave(pair)
    store.start(pair[0], pair[0])
    store.end(pair[0], pair[0])
    store.registry.close()


class RegistryMachine(RuleBasedStateMachine):
    """Names come, are replaced and go while requests wait, run and end; nobody ever sees bytes that are not theirs."""

    def __init__(self):
        super().__init__()
        self.store = Store(room=2, slots=3, used=2)
        self.adapters = [make_adapter(CONFIG, rank=4, modules=("q_proj", "v_proj"), seed=i) for i in range(4)]
        packed = [pack_adapter(adapter, CONFIG, FLOAT16) for adapter in self.adapters]
        self.expected = {p.digest: p.data for p in packed}
        self.root = RegistryMachine.root
        self.waiting, self.running = [], []

    @rule(name=st.sampled_from("abc"), i=st.integers(0, 3), folder=st.booleans())
    def add(self, name, i, folder):
        self.store.registry.add(name, self.root / f"a{i}" if folder else self.adapters[i])

    @precondition(lambda self: self.store.registry.names)
    @rule(i=st.integers(0, 9))
    def remove(self, i):
        names = sorted(self.store.registry.names)
        self.store.registry.remove(names[i % len(names)])

    @precondition(lambda self: self.store.registry.names)
    @rule(wanted=st.lists(st.integers(0, 9), min_size=1, max_size=2))
    def submit(self, wanted):
        registry = self.store.registry
        names = sorted(registry.names)
        versions = [registry.get(name) for name in sorted({names[i % len(names)] for i in wanted})]
        registry.enter(versions)
        registry.is_ready(versions)
        self.waiting.append(versions)

    @precondition(lambda self: self.waiting)
    @rule(i=st.integers(0, 9))
    def start(self, i):
        versions = self.waiting[i % len(self.waiting)]
        while not self.store.registry.is_ready(versions):
            self.store.settle()
        if self.store.registry.acquire(versions):
            self.waiting.remove(versions)
            self.running.append(versions)

    @precondition(lambda self: self.waiting)
    @rule(i=st.integers(0, 9))
    def cancel(self, i):
        self.store.registry.leave(self.waiting.pop(i % len(self.waiting)))

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 9))
    def end(self, i):
        versions = self.running.pop(i % len(self.running))
        self.store.registry.release(versions)
        self.store.registry.leave(versions)

    @rule()
    def settle(self):
        self.store.settle()

    @invariant()
    def books(self):
        registry = self.store.registry
        registry.check_integrity()
        pool = registry.pool
        held = Counter(version.digest for versions in self.running for version in versions)
        pool.check_references(held)
        for digest in held:
            slot = pool._slots[digest]
            data = pool.arrays.arena[slot.start : slot.start + slot.size]
            assert np.array_equal(data, self.expected[digest])

    def teardown(self):
        registry = self.store.registry
        for versions in self.running:
            registry.release(versions)
        for versions in self.running + self.waiting:
            registry.leave(versions)
        for name in list(registry.names):
            registry.remove(name)
        self.store.settle()
        assert registry.pool.used == 0 and not registry._retired and registry._outstanding == 0
        registry.close()


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


@pytest.fixture(autouse=True, scope="module")
def _shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    for i in range(4):
        save_adapter(root / f"a{i}", CONFIG, seed=i)
    RegistryMachine.root = root
