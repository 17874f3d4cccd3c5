"""Adapters over HTTP: names, folders, loading and unloading; S6, S7, S8."""

import concurrent.futures
import os
import shutil
import time

from minilora import LoRARequest, SamplingParams

from ..support import LINEAR, save_adapter
from .conftest import CONFIG, MODEL, NAMES, PROMPT, assert_idle
from .lora import ADMIN, ask, load, make_wrong, models, text, unload

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
    itself = ask(server, lora=[{"name": MODEL}])
    assert itself.status_code == 404 and "Did you mean" not in itself.json()["error"]["message"]
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


def test_a_folder_that_goes_away(shop, expected):
    """Its adapter does too, for new requests; a new folder of that name is found again."""
    assert text(shop, "a0") == expected["a0"]
    away = shop.folder.with_name("away")
    (shop.folder / "a0").rename(away)
    assert ask(shop, "a0").status_code == 404 and shop.stats().adapters.registered == 0
    away.rename(shop.folder / "a0")
    assert text(shop, "a0") == expected["a0"]


def test_a_new_folder_is_listed_with_its_first_answer(shop, shelf):
    """The folder is looked at once a second; what a request has found by then is known all the same."""
    assert "new" not in models(shop)
    shutil.copytree(shelf / "a1", shop.folder / "new")
    assert text(shop, "new") and "new" in models(shop)
    assert unload(shop, "new").status_code == 200 and ask(shop, "new").status_code == 404


def test_folders_that_come_and_go_leave_nothing(shop, shelf):
    """Whoever lists the models has those forgotten whose folders are gone, though no request names them again."""
    for i in range(3):
        shutil.copytree(shelf / "a1", shop.folder / f"t{i}")
        assert text(shop, f"t{i}")
        shutil.rmtree(shop.folder / f"t{i}")
    time.sleep(1.1)  # The folder is looked at once a second.
    assert not {"t0", "t1", "t2"} & models(shop).keys()
    assert shop.stats().adapters.registered == 0 and not shop.app.state.server.names.known


def test_the_folder_of_all_that_goes_away(shop, expected, caplog):
    """What it held is unknown then, the base model serves on, and the operator is told."""
    away = shop.folder.with_name("all-away")
    shop.folder.rename(away)
    assert ask(shop, "a0").status_code == ask(shop, "nothing").status_code == 404
    assert "a0" not in models(shop) and text(shop, MODEL) == expected[MODEL]
    assert "lora_dir cannot be read" in caplog.text
    away.rename(shop.folder)
    assert text(shop, "a0") == expected["a0"]


def test_links_that_lead_nowhere_hide_no_others(shop, expected):
    """One in a circle, and one to a name that can't be; as a name and as a path they are like none."""
    (shop.folder / "loop").symlink_to("loop")
    (shop.folder / "long").symlink_to("x" * 300)
    time.sleep(1.1)  # The folder is looked at once a second.
    assert {"a0", "a1"} <= models(shop).keys() and text(shop, "a0") == expected["a0"]
    for name in ("loop", "long"):
        assert name not in models(shop) and ask(shop, name).status_code == 404
        assert load(shop, "new", name).status_code == 400


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
