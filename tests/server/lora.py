"""Asking a server for adapters, loading them, and making wrong ones."""

import contextlib
import itertools
import json
import os
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from ..support import LINEAR, peft_tensors, save_adapter
from .conftest import CONFIG, MODEL, PROMPT

ADMIN = {"Authorization": "Bearer admin"}


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


def load(running, name, path, **fields):
    body = {"lora_name": name, "lora_path": path, **fields}
    return running.client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)


def unload(running, name, **fields):
    return running.client.post("/v1/unload_lora_adapter", json={"lora_name": name, **fields}, headers=ADMIN)


@contextlib.contextmanager
def stream(running, model, tokens=400, **fields):
    """The chunks of PROMPT's answer, which has begun."""
    body = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    with running.client.stream("POST", "/v1/completions", json={**body, **fields}) as answer:
        chunks = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {"))
        yield itertools.chain([next(chunks)], chunks)


def replace(source, target):
    """Put an adapter in place of another at once."""
    shutil.copytree(source, target.with_name("new"))
    shutil.rmtree(target)
    target.with_name("new").rename(target)


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
