"""Adapters come and go while texts run."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.errors import AdapterError, MiniloraError, NotFoundError
from minilora.params import SamplingParams

from ..support import peft_tensors, random_tokens, save_adapter
from .driver import PROMPT, SHORT, Driver, alone, with_adapters


def test_l2_adapters_are_loaded_around_a_running_text(weights, shelf, needle):
    driver = with_adapters(weights, shelf, max_loras=2, max_cpu_loras=2)
    sequence, others = driver.submit("n", scale=0.75), []
    for i in range(40):
        if i % 2 == 0:
            others.append(driver.submit(f"a{(0, 1, 3, 4, 5, 6, 7)[i % 7]}", PROMPT[:40], SHORT))
        driver.step()
    driver.run()
    assert driver.trace(sequence) == needle
    assert driver.engine.stats().adapters.evictions >= 5
    assert all(other.finish_reason == "length" for other in others)
    driver.idle()


def test_l3_replaced_under_the_same_name_and_path(weights, shelf, tmp_path):
    folder = shutil.copytree(shelf[0], tmp_path / "a")
    driver = Driver(weights)
    driver.engine.add_adapter(folder, "a")
    old = driver.submit("a")
    for _ in range(3):
        driver.step()
    shutil.copytree(shelf[1], folder, dirs_exist_ok=True)
    driver.engine.add_adapter(folder, "a")
    new = driver.submit("a")
    driver.run()
    assert driver.trace(old) == alone(weights, shelf[0]), "running requests finish on the old version"
    assert driver.trace(new) == alone(weights, shelf[1])
    assert new.cached == 0, "keys and values of the old version are not the new one's"
    driver.idle()


def test_l4_unloading_frees(weights, shelf):
    driver = Driver(weights)
    for cycle in range(300):
        name = f"a{cycle % 8}"
        driver.engine.add_adapter(shelf[cycle % 8], name)
        driver.submit(name, [5, 6, 7], SamplingParams(max_tokens=1))
        driver.run()
        driver.engine.remove_adapter(name)
        with pytest.raises(NotFoundError):
            driver.engine.adapters.get(name)
        assert driver.engine.stats().adapters.bytes == 0
    assert driver.engine.stats().by_adapter == {}
    driver.idle()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moment", ["queue", "prefill", "decode"])
def test_l5_unloaded_while_in_use(weights, shelf, moment, force):
    driver = Driver(weights, max_num_seqs=1 if moment == "queue" else 4, max_num_batched_tokens=64)
    driver.engine.add_adapter(shelf[0], "a")
    bystander = driver.submit()
    used = driver.submit("a")
    enough = {"queue": lambda: True, "prefill": lambda: used.computed > 0, "decode": lambda: used.generated > 1}[moment]
    while not enough():
        driver.step()
    driver.engine.remove_adapter("a", force)
    driver.run()
    if force:
        assert used.finish_reason == "error" and isinstance(used.error, AdapterError)
    else:
        assert driver.trace(used) == alone(weights, shelf[0])
    assert driver.trace(bystander) == alone(weights)
    assert driver.engine.stats().adapters.bytes == 0
    driver.idle()


def test_l6_alternation_over_a_shared_prefix(weights, shelf):
    prompt = random_tokens(np.random.default_rng(2), 600)
    params = SamplingParams(max_tokens=4, logprobs=1, temperature=0, ignore_eos=True)
    expected = [alone(weights, shelf[i], prompt=prompt, params=params) for i in range(2)]
    driver = Driver(weights, max_num_batched_tokens=96, max_num_seqs=4)
    for i in range(2):
        driver.engine.add_adapter(shelf[i], f"a{i}")
    sequences = []
    for round_ in range(50):
        sequences.append((round_ % 2, driver.submit(f"a{round_ % 2}", prompt, params)))
        for _ in range(1 + round_ % 3):
            driver.step()
    driver.run()
    for which, sequence in sequences:
        assert driver.trace(sequence) == expected[which]
    assert driver.engine.stats().prefix_hits > 0
    driver.idle()


def test_l7_bad_adapters_beside_good_ones(weights, shelf, tmp_path, needle):
    """Fifty adapters that can't be loaded, each in its own way, while the needle runs."""
    driver = with_adapters(weights, shelf)
    sequence, bad = driver.submit("n", scale=0.75), []
    for i in range(50):
        folder = save_adapter(tmp_path / f"bad{i}", weights.config, 4, seed=i)
        tensors = peft_tensors(weights.config, 4, ("q_proj", "v_proj"), i)
        name = sorted(tensors)[i % len(tensors)]
        kind = i % 5
        if kind == 0:
            (folder / "adapter_model.safetensors").write_bytes(b"\xff" * (i + 1))
        elif kind == 1:
            tensors[name][0, 0] = np.nan
        elif kind == 2:
            del tensors[name]
        elif kind == 3:
            tensors[name] = tensors[name][:, :-1].copy()
        else:
            content = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(content | {"use_dora": True}))
        if kind in (1, 2, 3):
            save_file(tensors, folder / "adapter_model.safetensors")
        try:
            driver.engine.add_adapter(folder, f"bad{i}")
        except MiniloraError:
            continue
        bad.append(driver.submit(f"bad{i}", PROMPT[:20], SHORT))
        driver.step()
    driver.run()
    assert driver.trace(sequence) == needle
    assert len(bad) >= 40 and all(s.finish_reason == "error" and isinstance(s.error, MiniloraError) for s in bad)
    driver.idle()
