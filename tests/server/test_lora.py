"""L1 to L11 over HTTP: whatever happens to adapters, pages and neighbours, every answer is the one it has alone."""

import concurrent.futures
import random
import shutil
import threading

import pytest

from minilora import cache

from .conftest import MODEL, NAMES, PROMPT, assert_idle
from .lora import ask, load, make_wrong, models, replace, stream, text, unload


def test_l1_mixed_batch_exact(server, expected):
    """All adapters and the base model at once: each answer is the one it has alone."""
    names = random.Random(1).choices(NAMES, k=40)
    assert {*names} == {*NAMES}
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
    # What is to be cut off must not end by itself, however slow this client is.
    with stream(shop, "a0", tokens=4000 if force else 400) as running, stream(shop, "a1", tokens=200) as other:
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
