"""The packed cache: written once, mapped afterwards, made anew when damaged or stale, done without when it can't be."""

import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from minilora.checkpoint import open_checkpoint
from minilora.errors import FormatError, NotFoundError, UsageError
from minilora.loading import PIECES, _key, load_model
from minilora.memory import HUGE_PAGE
from minilora.packed import ARENA, MANIFEST, _digest, _write_arena, checksum, read_packed, write_packed
from minilora.plan import DOWN, INPUT_NORM, Q_NORM, QKV, QKV_PARTS, WINDOW, Plan, Target
from minilora.tables import check_tables
from minilora_kernels.formats import FORMAT_NAMES, INT4K, INT8, PAIR
from minilora_kernels.pack import BLOCK_BYTES, COLUMNS, FORMAT, GROUP, OFFSET, ROWS, block_bytes

from .gguf_maker import write_llama
from .support import load_weights, make_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return make_checkpoint(folder)


def folder_of(cache):
    [folder] = [path for path in cache.iterdir() if not path.name.startswith(".")]
    return folder


def load(model, *said, dtype="int8"):
    messages = []
    loaded = load_model(model, "m", Target(dtype), messages.append)
    return loaded, messages


def test_packed_once_and_mapped_afterwards(cache, model, monkeypatch):
    first, said = load(model)
    assert any("packing" in message for message in said)
    # A checkpoint's header alone can take as long to read as all else together.
    monkeypatch.setattr("minilora.loading.open_checkpoint", None)
    again, said = load(model)
    assert said == [] and again.folder == first.folder == folder_of(cache)
    assert np.array_equal(first.weights.arena, again.weights.arena)
    assert np.array_equal(again.weights.matrices, first.weights.matrices)
    assert again.weights.arena.base is not None and again.weights.arena.flags.writeable


@pytest.mark.parametrize("sizes", [[], [1], [HUGE_PAGE], [HUGE_PAGE - 1, 2], [5, 2 * HUGE_PAGE, 0, 70, HUGE_PAGE]])
def test_the_arena_is_written_in_huge_pages_and_whole(tmp_path, sizes):
    chunks = [np.random.default_rng(size).integers(0, 256, size, np.uint8) for size in sizes]
    _write_arena(tmp_path / "file", chunks)
    assert (tmp_path / "file").read_bytes() == b"".join(chunk.tobytes() for chunk in chunks)


def test_formats_have_folders_of_their_own(cache, model):
    for dtype in ("int8", "int4", "float32"):
        load(model, dtype=dtype)
    assert len(list(cache.iterdir())) == 3


def test_a_group_size_without_effect_needs_no_folder_of_its_own(cache, model):
    for dtype in ("auto", "int4"):
        for group in (32, 64):
            load_model(model, "m", Target(dtype, group))
    assert len(list(cache.iterdir())) == 3


def test_others_may_read_it_as_the_umask_says(cache, model):
    before = os.umask(0o022)
    try:
        load(model)
    finally:
        os.umask(before)
    assert folder_of(cache).stat().st_mode & 0o777 == 0o755


def test_a_packed_folder_that_may_not_be_read_is_named(cache, model, monkeypatch):
    load(model)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("minilora.packed.read_json", refuse)
    with pytest.raises(FormatError, match=rf"{MANIFEST} may not be read"):
        load_model(folder_of(cache), "m")


def test_a_folder_replaced_while_it_is_read_is_done_without(cache, model, monkeypatch):
    def replaced(folder, *given, **more):
        write_packed(folder, *given, **more)
        (folder / MANIFEST).unlink()

    monkeypatch.setattr("minilora.loading.write_packed", replaced)
    loaded, said = load(model)
    assert loaded.folder is None and any("cannot read what was just packed" in message for message in said)


def damage_arena(folder):
    raw = bytearray((folder / ARENA).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / ARENA).write_bytes(raw)


def cut_arena(folder):
    (folder / ARENA).write_bytes((folder / ARENA).read_bytes()[:-64])


def damage_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"embed": 0', '"embed": 1'))


def cut_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])


def remove_arena(folder):
    (folder / ARENA).unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    "damage", [damage_arena, cut_arena, damage_manifest, cut_manifest, remove_arena, break_tokenizer]
)
def test_a_damaged_cache_is_rebuilt(cache, model, damage):
    good = load(model)[0].weights.arena.copy()
    damage(folder_of(cache))
    repaired, said = load(model)
    assert any("packing" in message for message in said)
    assert np.array_equal(repaired.weights.arena, good)
    assert load(model)[1] == []


@pytest.mark.parametrize("shards", [1, 2])
def test_a_changed_checkpoint_is_packed_anew(cache, tmp_path, shards):
    folder = tmp_path / "model"
    folder.mkdir()
    make_checkpoint(folder, shards=shards)
    (folder / "special_tokens_map.json").write_text("{}")
    load(folder)
    for file in folder.iterdir():
        os.utime(file, ns=(1, 1))
        assert any("packing" in message for message in load(folder)[1]), file
    assert load(folder)[1] == []


def test_other_weights_of_the_same_size_and_times_are_packed_anew(cache, tmp_path):
    """As archives unpack them, that give all files one time."""
    folder = tmp_path / "model"
    folder.mkdir()
    found = []
    for seed in (1, 2):
        make_checkpoint(folder, seed=seed)
        for file in folder.iterdir():
            os.utime(file, ns=(1, 1))
        found.append(load(folder)[0].weights.floats()["lm_head.weight"])
    assert not np.array_equal(*found)


@pytest.mark.parametrize("piece", [0, 16, PIECES - 1])
def test_a_large_file_is_known_by_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr("minilora.loading.PIECE", 64)
    path = tmp_path / "model.gguf"
    write_llama(path)
    before, times, raw = _key(path, Target()), os.stat(path), bytearray(path.read_bytes())
    assert len(raw) > 64 * PIECES
    raw[(len(raw) - 64) * piece // (PIECES - 1) + 5] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert _key(path, Target()) != before


def test_a_greedy_models_other_defaults_stay(cache, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    make_checkpoint(folder)
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    loaded = load(folder)[0]
    params = loaded.default_params()
    assert (params.temperature, params.top_p, params.repetition_penalty) == (0, 0.9, 1.3)
    assert loaded.default_params(temperature=0.7).repetition_penalty == 1.3


def test_a_hidden_folders_model_is_kept_like_others(cache, tmp_path):
    folder = tmp_path / ".hidden"
    folder.mkdir()
    make_checkpoint(folder)
    assert load(folder)[0].folder.name.startswith("hidden-")


def test_a_changed_gguf_file_has_another_folder(tmp_path):
    path = tmp_path / "model.gguf"
    write_llama(path)
    before = _key(path, Target())
    assert _key(path, Target()) == before
    os.utime(path, ns=(1, 1))
    assert _key(path, Target()) != before


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_without_room_the_model_runs_from_memory(cache, model, error, monkeypatch):
    expected = load(model)[0].weights.arena.copy()
    for path in folder_of(cache).iterdir():
        path.unlink()

    def refuse(*_, **more):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("minilora.loading.write_packed", refuse)
    loaded, said = load(model)
    assert loaded.folder is None and np.array_equal(loaded.weights.arena, expected)
    assert any(os.strerror(error) in message and "MINILORA_CACHE" in message for message in said)


def test_a_full_disk_leaves_nothing_behind(cache, model, monkeypatch):
    """The arena is written from front to back, so a full disk is an error, not a crash in mapped memory."""
    checkpoint = open_checkpoint(model)
    plan = Plan(checkpoint, Target("int8"))

    def chunks(self):
        yield np.zeros(64, np.uint8)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("minilora.packed.Packer.chunks", chunks)
    with pytest.raises(OSError, match="No space"):
        write_packed(cache / "x", plan, checkpoint.tokenizer())
    assert list(cache.iterdir()) == []


def test_concurrent_starts(cache, model):
    """Threads that pack at once all get the same model, and one folder stays."""
    arenas = []

    def start():
        arenas.append(load(model)[0].weights.arena.copy())

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(arenas) == 6 and all(np.array_equal(arena, arenas[0]) for arena in arenas)
    assert len(list(cache.iterdir())) == 1


def test_quantize_writes_a_model_that_loads(cache, model, tmp_path):
    target = tmp_path / "packed"
    run = subprocess.run(
        [sys.executable, "-m", "minilora", "quantize", str(model), str(target), "--dtype", "int4"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stdout.strip() == str(target), run.stderr
    loaded = load_model(target, "m")
    expected, _ = load(model, dtype="int4")
    assert np.array_equal(loaded.weights.arena, expected.weights.arena) and loaded.eos == {2}
    assert json.loads((target / MANIFEST).read_text())["dtype"] == "int4"


def test_the_tokenizers_end_counts_too(tmp_path):
    """Whoever trains on chats often names its end there alone; an id beyond the vocabulary ends nothing."""
    folder = make_checkpoint(tmp_path, eos_token_id=[1, 10**6])
    (folder / "generation_config.json").unlink()
    for names, expected in (({}, {1}), ({"eos_token": "<|im_end|>"}, {1, 2}), ({"eos_token": "<nothing>"}, {1})):
        (folder / "tokenizer_config.json").write_text(json.dumps(names))
        assert load_model(folder, "m").eos == expected


def test_a_packed_folder_keeps_its_format(cache, model):
    folder = load(model)[0].folder
    for target in (Target(), Target("int8"), Target("int8", 32)):
        assert load_model(folder, "m", target).weights.formats == (INT8,)
    for target in (Target("float32"), Target("int4"), Target("int8", 64)):
        with pytest.raises(UsageError, match="packed as int8 with groups of 32"):
            load_model(folder, "m", target)


def test_what_stands_in_a_models_place_stays(model, tmp_path):
    """It may have come while the model was packed, which takes minutes."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("precious")
    checkpoint = open_checkpoint(model)
    with pytest.raises(OSError):
        write_packed(target, Plan(checkpoint, Target("int8")), checkpoint.tokenizer())
    assert (target / "notes.txt").read_text() == "precious"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".target")]


def test_what_killed_processes_have_left_is_removed(cache, model):
    old, new = (cache / f".other-{i:016x}" for i in range(2))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / ARENA).write_bytes(b"half")
    for path in (old / ARENA, old):
        os.utime(path, (1, 1))
    load(model)
    assert new.exists() and not old.exists()


def test_what_was_not_used_for_long_is_removed_when_another_model_is_packed(cache, model):
    old, used = (load(model, dtype=dtype)[0].folder for dtype in ("int4", "float32"))
    other = cache / "not a model"
    other.mkdir()
    for folder in (old, used, other):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (1, 1))
    load(model, dtype="float32")
    assert old.exists()
    new = load(model, dtype="int8")[0].folder
    assert used.exists() and new.exists() and other.exists() and not old.exists()


def at(*place, value):
    """A function that sets one number of a manifest's tables."""

    def change(content):
        for key in place[:-1]:
            content = content[key]
        content[place[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        at("matrices", 0, OFFSET, value=1 << 46),
        at("matrices", 0, OFFSET, value=-64),
        at("matrices", 1, OFFSET, value=8),
        at("matrices", 2, FORMAT, value=99),
        at("matrices", 2, FORMAT, value=len(FORMAT_NAMES)),
        at("matrices", 2, FORMAT, value=-1),
        at("matrices", 2, GROUP, value=1 << 20),
        at("matrices", 3, ROWS, value=1 << 30),
        at("matrices", 3, BLOCK_BYTES, value=64),
        at("layers", 0, QKV, value=7000),
        at("layers", 1, QKV_PARTS, value=0),
        at("layers", 1, DOWN, value=0),
        at("layers", 1, INPUT_NORM, value=1 << 40),
        at("layers", 0, Q_NORM, value=0),
        at("layers", 0, WINDOW, value=5),
        at("embed", value=1000),
        at("embed", value="1"),
        at("head", value=-5),
        at("final_norm", value=1 << 40),
        at("config", "vocab_size", value=1 << 20),
        at("config", "num_hidden_layers", value=3),
        at("config", "head_dim", value=32),
    ],
)
def test_tables_that_lead_elsewhere_are_refused(cache, model, change):
    """Whoever writes a folder can write its digest too, and kernels read what the tables say."""
    folder = load(model)[0].folder
    change_manifest(folder, change)
    with pytest.raises(FormatError):
        read_packed(folder, "m")


def change_manifest(folder, change):
    content = json.loads((folder / MANIFEST).read_text())
    del content["digest"]
    change(content)
    (folder / MANIFEST).write_text(json.dumps({**content, "digest": _digest(content)}))


@pytest.mark.parametrize("dtype, group", [("bfloat16", PAIR), ("bfloat16+inputs", 0), ("bfloat16+inputs", 32)])
def test_groups_of_floats_say_which_inputs_are_read(cache, model, dtype, group):
    folder = load(model, dtype=dtype)[0].folder
    change_manifest(folder, at("matrices", 2, GROUP, value=group))
    with pytest.raises(FormatError, match="group"):
        read_packed(folder, "m")


def test_nested_formats_need_whole_records(cache, model):
    """Units are for 256 columns, which this model does not have."""
    weights = load(model)[0].weights
    row = weights.matrices[0]
    assert row[COLUMNS] % 256
    row[FORMAT], row[BLOCK_BYTES] = INT4K, block_bytes(INT4K, row[COLUMNS], row[GROUP])
    with pytest.raises(FormatError, match="group is wrong"):
        check_tables(weights)


def test_matrices_with_the_same_inputs_have_one_group(tmp_path):
    """These are quantised once, in the group of the first."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
    write_llama(tmp_path / "m.gguf", "Q4_K", mixed={"blk.0.attn_v.weight": "Q6_K"}, **shape)
    weights = load_weights(tmp_path / "m.gguf")
    check_tables(weights)
    row = weights.matrices[weights.layers[0, QKV]]
    row[GROUP], row[BLOCK_BYTES] = 32, block_bytes(row[FORMAT], row[COLUMNS], 32)
    with pytest.raises(FormatError, match="same inputs"):
        check_tables(weights)


def test_checksum_sees_every_byte():
    data = np.random.default_rng(0).integers(0, 256, 3 * (1 << 20) + 5, np.uint8)
    good = checksum(data)
    for at in (0, 7, 1 << 20, len(data) - 1, len(data) - 6):
        data[at] ^= 16
        assert checksum(data) != good
        data[at] ^= 16
    assert checksum(data) == good


def test_missing_and_wrong(tmp_path):
    with pytest.raises(NotFoundError):
        read_packed(tmp_path, "m")
    with pytest.raises(UsageError, match="dtype"):
        Target("int3")
    with pytest.raises(UsageError, match="group"):
        Target("int4", 48)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(FormatError):
        read_packed(tmp_path, "m")
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(FormatError, match="another version of minilora\nDelete the folder, and quantize its source"):
        read_packed(tmp_path, "m")
