"""Adapters over HTTP: names, folders, loading and unloading; S6, S7, S8 and L1 to L11 as far as HTTP is concerned."""

import concurrent.futures
import json
import os
import random
import shutil
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import LoRARequest, SamplingParams, cache

from ..support import LINEAR, peft_tensors, save_adapter
from .conftest import CONFIG, MODEL, assert_idle

PROMPT = "The quick brown fox jumps over the lazy dog and then "
NAMES = (MODEL, "a0", "a1", "a2", "a3")
ADMIN = {"Authorization": "Bearer admin"}


@pytest.fixture(scope="session")
def expected(llm):
    """name -> greedy text, from LLM, one by one."""
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    found = {
        name: llm.generate(PROMPT, params, None if name == MODEL else LoRARequest(name))[0].outputs[0].text
        for name in NAMES
    }
    assert len(set(found.values())) == len(NAMES)
    return found


def ask(running, model=MODEL, client=None, **fields):
    """The answer to PROMPT, with an ordinary key."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    return (client or running.client).post("/v1/completions", json=body)


def text(running, model=MODEL, **fields):
    answer = ask(running, model, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def models(running):
    return {card["id"]: card for card in running.client.get("/v1/models").json()["data"]}


@pytest.fixture
def shop(serve, shelf, tmp_path):
    """A server that may load at run time from a folder of its own, with a0 and a1 in it."""
    folder = tmp_path / "adapters"
    for name in ("a0", "a1"):
        shutil.copytree(shelf / name, folder / name)
    running = serve(
        lora_dir=folder,
        enable_runtime_lora=True,
        api_keys=("user",),
        admin_keys=("admin",),
        engine={"max_cpu_loras": 16},
    )
    running.folder = folder
    yield running
    assert_idle(running)


def load(running, name, path, **fields):
    body = {"lora_name": name, "lora_path": path, **fields}
    return running.client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)


def unload(running, name, **fields):
    return running.client.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields}, headers=ADMIN)


# ---------------------------------------------------------------- names


def test_every_way_to_name_an_adapter(server, expected, llm):
    for name in NAMES[1:]:
        assert text(server, name) == text(server, f"{MODEL}:{name}") == expected[name]
        assert text(server, lora=[{"name": name}]) == text(server, None, lora=[{"name": name}]) == expected[name]
        assert ask(server, f"{MODEL}:{name}").json()["model"] == f"{MODEL}:{name}"
    assert (
        text(server, lora=[{"name": "a0", "scale": 0}])
        == text(server, lora=[])
        == text(server, None)
        == expected[MODEL]
    )
    both = [LoRARequest("a1", scale=0.5), LoRARequest("a2", scale=0.75)]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    uses = [{"name": "a1", "scale": 0.5}, {"name": "a2", "scale": 0.75}]
    assert text(server, lora=uses) == llm.generate(PROMPT, params, [both])[0].outputs[0].text


def test_models_are_listed(server):
    cards = models(server)
    assert list(cards) == list(NAMES)
    assert cards[MODEL]["parent"] is None and cards[MODEL]["max_model_len"] == 512
    assert cards["a0"]["parent"] == MODEL and cards["a0"]["root"] == "a0"
    assert all("/" not in card["root"] for card in cards.values())
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == list(NAMES)
        assert client.models.retrieve("a3").id == client.models.retrieve(f"{MODEL}:a3").id == "a3"
    assert server.client.get("/v1/models/a9").status_code == 404


def test_served_names(serve, model, expected, shelf):
    running = serve(served_model_name=("one", "two"), lora_dir=shelf)
    assert text(running, "one") == text(running, "two") == expected[MODEL]
    assert text(running, "two:a0") == expected["a0"]
    assert ask(running, "two").json()["model"] == "two" and list(models(running))[:2] == ["one", "two"]
    assert ask(running, os.path.basename(model)).status_code == 404


# ---------------------------------------------------------------- S6

WRONG_ADAPTERS = {
    "rank-0": dict(rank=4, r=0),
    "rank-huge": dict(rank=4, r=10**9),
    "rank-other": dict(rank=4, r=5),
    "target-unknown": dict(rank=4, target_modules=["no_such_proj"]),
    "dora": dict(rank=4, use_dora=True),
    "saved-modules": dict(rank=4, modules_to_save=["lm_head"]),
    "not-lora": dict(rank=4, peft_type="IA3"),
    "alpha-nan": dict(rank=4, lora_alpha=float("nan")),
}


def spoil(folder, change):
    """Change the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def make_wrong(root):
    """Folders with adapters that must not be used; their names."""
    names = []
    for name, settings in WRONG_ADAPTERS.items():
        save_adapter(root / name, CONFIG, **{"modules": LINEAR[:7], **settings})
        names.append(name)
    first = next(iter(peft_tensors(CONFIG, 4, LINEAR[:7], 1)))
    for name, change in {
        "half": lambda t: t.pop(first),
        "nan": lambda t: t[first].__setitem__((0, 0), np.nan),
        "infinite": lambda t: t[first].__setitem__((0, 0), np.inf),
        "wrong-shape": lambda t: t.__setitem__(first, np.zeros((4, 3), np.float32)),
        "stranger": lambda t: t.__setitem__("base_model.model.lm_head.unknown", np.zeros(3, np.float32)),
    }.items():
        spoil(save_adapter(root / name, CONFIG, 4, LINEAR[:7]), change)
        names.append(name)
    cut = save_adapter(root / "cut", CONFIG, 4) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    pickle = save_adapter(root / "pickle", CONFIG, 4)
    os.replace(pickle / "adapter_model.safetensors", pickle / "adapter_model.bin")
    return [*names, "cut", "pickle"]


def test_s6_adapter_shapes(shop, expected):
    """What is wrong with an adapter is an error, wherever it is named: never the base model's answer."""
    for name in make_wrong(shop.folder):
        error = load(shop, name, name)
        assert error.status_code == 400, name
        assert error.json()["error"]["param"] == "lora_path" and str(shop.folder) not in error.text
        used = ask(shop, name)
        assert used.status_code in (400, 404, 500) and "choices" not in used.json(), (name, used.text)
        assert str(shop.folder) not in used.text
    assert text(shop, "a0") == expected["a0"]


def test_s6_unknown_names(server):
    """Unknown, misspelt or strange names are 404 with the nearest known one; never the base model."""
    for name in (
        "a9",
        "A0",
        "a0 ",
        " tiny",
        "tiny:",
        ":a0",
        "tiny:a9",
        "tiny:tiny:a0",
        "a0:tiny",
        "other:a0",
        "",
        "None",
    ):
        answer = ask(server, name)
        assert answer.status_code == 404, (name, answer.text)
        assert answer.json()["error"]["code"] == "model_not_found"
    assert "Did you mean 'a0'" in ask(server, "a00").json()["error"]["message"]
    assert ask(server, lora=[{"name": "a9"}]).status_code == 404
    assert ask(server, lora=[{"name": MODEL}]).status_code == 404
    both = ask(server, "a0", lora=[{"name": "a1"}])
    assert both.status_code == 400 and both.json()["error"]["param"] == "model"


# ---------------------------------------------------------------- S7


def test_s7_path_traversal(shop, shelf, tmp_path, expected):
    """Neither a name nor a path, nor a link inside the folder, leads out of it."""
    outside = tmp_path / "outside"
    shutil.copytree(shelf / "a2", outside)
    (shop.folder / "link").symlink_to(outside)
    half = shop.folder / "half-link"
    half.mkdir()
    shutil.copy(outside / "adapter_config.json", half)
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (shop.folder / "inner").symlink_to(shop.folder / "a1")
    for path in (
        "..",
        ".",
        "",
        "/",
        "../outside",
        "a0/../../outside",
        str(outside),
        "link",
        "half-link",
        f"file://{outside}",
        "file:../outside",
        "..%2foutside",
        "%2e%2e/outside",
        "a0\0/../../outside",
        "\\\\host\\share",
        "//host/share",
        "~",
        "~root",
        "x" * 5000,
        "a" * 300,
        "pirate",
        "org/name",
        "a0/adapter_config.json",
    ):
        answer = load(shop, "new", path)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_path", (path, answer.text)
        assert "outside" not in answer.json()["error"]["message"]
        assert ask(shop, path).status_code == (400 if len(path) > 512 else 404), path[:50]
    for name in (
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "a\0b",
        "a\nb",
        "ä",
        "x" * 129,
        "-x",
        ".x",
        "a..b",
        MODEL,
        "a b",
    ):
        answer = load(shop, name, "a0")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "lora_name", name
    assert "link" not in models(shop) and "half-link" not in models(shop) and "new" not in models(shop)
    assert text(shop, "inner") == expected["a1"], "a link that stays inside is fine"
    assert load(shop, "new", str(shop.folder / "a0")).status_code == 200, "so is a full path"
    assert text(shop, "new") == expected["a0"]


# ---------------------------------------------------------------- S8


def test_s8_runtime_lora_off(server, serve, shelf):
    """Loading and unloading want the option, and a key of their own."""
    for path, body in (
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a0"}),
        ("/v1/unload_lora_adapter", {"lora_name": "a0"}),
    ):
        assert server.client.post(path, json=body).status_code == 403
        off = serve(lora_dir=shelf, admin_keys=("admin",), api_keys=("user",))
        assert off.client.post(path, json=body).status_code == 403
        assert off.client.post(path, json=body, headers=ADMIN).status_code == 403
        on = serve(lora_dir=shelf, admin_keys=("admin",), api_keys=("user",), enable_runtime_lora=True)
        assert on.client.post(path, json=body).status_code == 403
        assert on.client.post(path, json=body, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert on.client.post(path, json=body, headers=ADMIN).status_code == 200
    assert text(server, "a0")


def test_load_and_unload(shop, expected, shelf):
    shutil.copytree(shelf / "a2", shop.folder / "later")
    card = load(shop, "mine", "later").json()
    assert (card["id"], card["parent"], card["root"]) == ("mine", MODEL, "later")
    assert text(shop, "mine") == text(shop, "later") == expected["a2"]
    again = load(shop, "mine", "a1")
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]
    assert load(shop, "mine", "a1", load_inplace=True).status_code == 200
    assert text(shop, "mine") == expected["a1"]
    assert unload(shop, "mine").json() == {"id": "mine", "object": "model", "deleted": True}
    assert ask(shop, "mine").status_code == 404 and unload(shop, "mine").status_code == 404
    assert unload(shop, "a0", lora_int_id=3).status_code == 200
    assert ask(shop, "a0").status_code == 404 and "a0" not in models(shop), "the folder does not bring it back"
    assert load(shop, "a0", "a0").status_code == 200 and text(shop, "a0") == expected["a0"]


# ---------------------------------------------------------------- L


def test_l1_mixed_batch_exact(server, expected):
    """All adapters, the base model and mixtures at once: each answer is the one it has alone."""
    names = [random.Random(1).choice(NAMES) for _ in range(40)]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(lambda name: text(server, name), names)) == [expected[name] for name in names]


def test_l2_hot_add_in_flight(shop, expected, shelf):
    """While a0 and a1 answer, others come and go; slots are fewer than adapters."""
    for i in range(6):
        shutil.copytree(shelf / f"a{i % 4}", shop.folder / f"b{i}")
    done = threading.Event()

    def churn():
        turns = 0
        while not done.is_set() or turns < 4:
            for i in range(6):
                assert load(shop, f"c{i}", f"b{i}", load_inplace=True).status_code == 200
                assert unload(shop, f"c{i}", force=i % 2 == 0).status_code == 200
            turns += 1

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        busy = pool.submit(churn)
        found = list(pool.map(lambda i: text(shop, f"a{i % 2}"), range(60)))
        done.set()
        busy.result(60)
    assert found == [expected[f"a{i % 2}"] for i in range(60)]


def test_l3_replace_same_name(shop, shelf, expected):
    """New weights under the same name and path: new requests use them, and no cached page of the old ones."""
    long = PROMPT * 3
    first = ask(shop, "a0", prompt=long).json()
    again = ask(shop, "a0", prompt=long).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128
    with stream(shop, "a0", tokens=300) as running:
        replace(shelf / "a3", shop.folder / "a0")
        new = ask(shop, "a0", prompt=long).json()
        assert new["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert new["choices"] != first["choices"] == again["choices"]
        assert text(shop, "a0") == expected["a3"]
        old = "".join(chunk["choices"][0]["text"] for chunk in running)
    assert old.startswith(expected["a0"]), "who had begun finishes on the old version"
    shutil.copy(shelf / "a2" / "adapter_model.safetensors", shop.folder / "a1")
    shutil.copy(shelf / "a2" / "adapter_config.json", shop.folder / "a1")
    assert load(shop, "a1", "a1", load_inplace=True).status_code == 200
    assert text(shop, "a1") == expected["a2"]


def replace(source, target):
    """Put an adapter in place of another at once."""
    shutil.copytree(source, target.with_name("new"))
    shutil.rmtree(target)
    target.with_name("new").rename(target)


class Stream:
    """An answer that is being streamed: its chunks, from an iterator."""

    def __init__(self, lines):
        self._lines = lines
        self.first = next(self)

    def __iter__(self):
        yield self.first
        yield from self._rest()

    def _rest(self):
        while True:
            try:
                yield next(self)
            except StopIteration:
                return

    def __next__(self):
        for line in self._lines:
            if line.startswith("data: {"):
                return json.loads(line[6:])
        raise StopIteration


class stream:  # noqa: N801 (used as a function)
    """A stream of PROMPT's answer that has begun."""

    def __init__(self, running, model, tokens=400, **fields):
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        self._answer = running.client.stream("POST", "/v1/completions", json={**body, **fields})

    def __enter__(self):
        return Stream(self._answer.__enter__().iter_lines())

    def __exit__(self, *error):
        self._answer.__exit__(*error)


def test_l4_unload_frees(shop, shelf):
    """What is unloaded is in no list, and its bytes are back, over and over."""
    before = shop.stats().adapters
    for turn in range(50):
        shutil.rmtree(shop.folder / "cycle", ignore_errors=True)
        shutil.copytree(shelf / f"a{turn % 4}", shop.folder / "cycle")
        assert load(shop, "cycle", "cycle").status_code == 200
        if turn % 5 == 0:
            text(shop, "cycle")
        assert unload(shop, "cycle").status_code == 200
    after = shop.stats().adapters
    assert (after.registered, after.resident, after.bytes) == (before.registered, before.resident, before.bytes)
    assert "cycle" not in models(shop) and "cycle" not in shop.client.get("/metrics").text


@pytest.mark.parametrize("force", [False, True])
def test_l5_unload_while_used(shop, expected, force):
    """Its requests finish, or end with an error; nobody gets the base model's answer, or somebody else's."""
    with stream(shop, "a0", tokens=400) as running, stream(shop, "a1", tokens=200) as other:
        assert unload(shop, "a0", force=force).status_code == 200
        assert ask(shop, "a0").status_code == 404
        chunks = list(running)
        assert "".join(chunk["choices"][0]["text"] for chunk in other).startswith(expected["a1"])
    if force:
        assert "unloaded" in chunks[-1]["error"]["message"], chunks[-1]
        chunks = chunks[:-1]
    else:
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    told = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert told.startswith(expected["a0"]) or (force and expected["a0"].startswith(told))


def test_l6_alternation(server, expected):
    """Two adapters in turn over one long prefix, many times: always the same answers."""
    prefix = {"prompt": PROMPT * 6}
    wanted = {name: text(server, name, **prefix) for name in ("a0", "a1", MODEL)}
    names = ["a0", "a1", MODEL, "a1"] * 10
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: text(server, name, **prefix), names))
    assert found == [wanted[name] for name in names]


def test_l7_bad_neighbour(shop, expected):
    """Loads of broken adapters, and requests for them, beside traffic."""
    names = make_wrong(shop.folder)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        bad = [pool.submit(load, shop, f"x{i}", names[i % len(names)]) for i in range(50)]
        bad += [pool.submit(ask, shop, names[i % len(names)]) for i in range(50)]
        good = list(pool.map(lambda i: text(shop, f"a{i % 2}"), range(40)))
        assert all(future.result(60).status_code >= 400 for future in bad)
    assert good == [expected[f"a{i % 2}"] for i in range(40)]


def test_l8_batch_invariance(server):
    """Log-probabilities of one request are bitwise the same alone and in a crowd."""
    needle = {"logprobs": 5, "max_tokens": 30, "prompt": PROMPT, "echo": True}
    alone = ask(server, "a2", **needle).json()["choices"]

    def crowd(i):
        rng = random.Random(i)
        fields = {"prompt": PROMPT[: rng.randrange(1, 50)], "max_tokens": rng.randrange(1, 40), "temperature": 1.0}
        return ask(server, rng.choice(NAMES), **fields).status_code

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        others = [pool.submit(crowd, i) for i in range(40)]
        found = [
            future.result().json()["choices"] for future in [pool.submit(ask, server, "a2", **needle) for _ in range(5)]
        ]
        assert all(future.result() == 200 for future in others)
    assert found == [alone] * 5


def test_l9_preempt_recompute(serve, shelf, server):
    """With too few pages for all, requests are computed again, with the same answers."""
    small = serve(lora_dir=shelf, engine={"kv_cache_memory": 24 * page_bytes(server), "enable_prefix_caching": False})
    fields = [{"max_tokens": 200, "temperature": 0.9, "seed": i} for i in range(8)]

    def all_texts(running):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda i: text(running, NAMES[i % 5], **fields[i]), range(8)))

    assert all_texts(small) == all_texts(server)
    assert small.stats().preemptions > 0


def page_bytes(running):
    runner = running.engine._llm.engine.runner
    return cache.page_bytes(runner.model, runner.kv_format, 32)


def test_l10_prefix_cache_exact(serve, shelf, server):
    cold = serve(lora_dir=shelf, engine={"enable_prefix_caching": False})
    long = {"prompt": PROMPT * 5, "logprobs": 2}
    for name in NAMES:
        wanted = ask(cold, name, **long).json()
        assert wanted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        found = [ask(server, name, **long).json() for _ in range(2)]
        assert found[1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 256
        assert [f["choices"] for f in found] == [wanted["choices"]] * 2
    assert_idle(cold)


def test_l11_seed(server):
    """A seed means a text: streamed or not, as one of n, alone or in a crowd."""
    fields = {"temperature": 1.0, "seed": 42, "max_tokens": 40}
    [wanted] = {text(server, "a1", **fields) for _ in range(3)}
    with stream(server, "a1", **{**fields, "tokens": 40, "max_tokens": 40}) as running:
        assert "".join(chunk["choices"][0]["text"] for chunk in running) == wanted
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        assert set(pool.map(lambda _: text(server, "a1", **fields), range(20))) == {wanted}
    texts = [choice["text"] for choice in ask(server, "a1", **{**fields, "n": 3}).json()["choices"]]
    assert texts[0] == wanted and len(set(texts)) == 3
    assert texts[1] == text(server, "a1", **{**fields, "seed": 43})


def test_a_folder_that_goes_away(shop, expected):
    """Its adapter does too, for new requests; a new folder of that name is found again."""
    assert text(shop, "a0") == expected["a0"]
    away = shop.folder.with_name("away")
    (shop.folder / "a0").rename(away)
    assert ask(shop, "a0").status_code == 404 and shop.stats().adapters.registered == 0
    away.rename(shop.folder / "a0")
    assert text(shop, "a0") == expected["a0"]


def test_more_adapters_than_room_in_a_folder(serve, tmp_path):
    """A folder of many adapters, of which few fit: found, read and put away as requests come."""
    for i in range(12):
        save_adapter(tmp_path / f"t{i}", CONFIG, 2 + i % 3, LINEAR[:7], seed=50 + i)
    running = serve(lora_dir=tmp_path, engine={"max_loras": 2, "max_cpu_loras": 3})
    wanted = {i: text(running, f"t{i}") for i in range(12)}
    assert len(set(wanted.values())) == 12
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: text(running, f"t{i % 12}"), range(48))) == [wanted[i % 12] for i in range(48)]
    stats = running.stats().adapters
    assert stats.evictions >= 9 and stats.resident <= 3
    assert_idle(running)
