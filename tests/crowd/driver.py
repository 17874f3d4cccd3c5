"""An engine among neighbours, driven step by step."""

import numpy as np

from minilora.params import SamplingParams
from minilora.sequence import AdapterUse, State

from ..support import make_engine, random_tokens

PROMPT = random_tokens(np.random.default_rng(5), 150)
PARAMS = SamplingParams(max_tokens=14, seed=3, temperature=0.8, top_p=0.95, logprobs=2, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


class Driver:
    """An engine, and what each of its sequences got."""

    def __init__(self, weights, **config):
        self.engine = make_engine(weights, **{"debug_checks": True, "max_lora_rank": 64, **config})
        # As on a machine where checking a draft costs nothing.
        self.engine._pace.draft_price = lambda texts: 0.0
        self.outputs = {}

    def submit(self, name=None, prompt=PROMPT, params=PARAMS, scale=1.0, **order):
        names = () if name is None else (name,) if isinstance(name, str) else name
        uses = tuple(AdapterUse(self.engine.adapters.get(one), scale) for one in names)
        return self.engine.submit(prompt, params, uses, **order)[0]

    def step(self):
        for output in self.engine.step():
            self.outputs.setdefault(output.sequence, []).append((output.token, output.logprobs))
        self.engine.wait(10)

    def run(self, sequence=None):
        while self.engine.busy if sequence is None else sequence.state is not State.FINISHED:
            self.step()
        return self

    def trace(self, sequence):
        assert sequence.state is State.FINISHED and sequence.error is None
        return sequence.tokens, self.outputs[sequence]

    def idle(self):
        """Everything is given back."""
        self.run()
        assert self.engine.pool.held == 0 and self.engine.runner.adapter_pool.in_use == 0
        self.engine.check_integrity()
        self.engine.close()


def alone(weights, *folders, prompt=PROMPT, params=PARAMS, scale=1.0):
    driver = Driver(weights)
    names = [driver.engine.add_adapter(folder, f"x{i}").name for i, folder in enumerate(folders)]
    sequence = driver.submit(names, prompt, params, scale)
    found = driver.run().trace(sequence)
    driver.idle()
    return found


def crowd(driver, count, seed):
    """Random neighbours with random adapters; the needle comes in their middle."""
    rng, found = np.random.default_rng(seed), None
    names = list(driver.engine.adapters.names)
    for i in range(count):
        if i == count // 2:
            found = driver.submit("n", scale=0.75)
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 25)),
            temperature=float(rng.choice([0, 1])),
            ignore_eos=True,
            n=int(rng.integers(1, 3)),
        )
        name = names[int(rng.integers(len(names)))] if rng.random() < 0.8 else None
        prompt = (
            PROMPT[: int(rng.integers(1, 150))] if rng.random() < 0.3 else random_tokens(rng, int(rng.integers(1, 90)))
        )
        driver.submit(name, prompt, params, float(rng.random()))
    return found


def with_adapters(weights, shelf, ready=False, **config):
    """A driver that knows all adapters; ready: they are loaded, so that nothing depends on when that happens."""
    driver = Driver(weights, **config)
    for i, folder in enumerate(shelf):
        registry = driver.engine.adapters
        registry.add("n" if i == 2 else f"a{i}", folder, loaded=registry.read(folder) if ready else None)
    return driver
