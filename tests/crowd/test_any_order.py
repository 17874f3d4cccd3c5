"""Random operations on everything: requests, cancellations, adapters."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from .driver import PROMPT, SHORT, Driver, alone

# Places on the shelf: all but the largest adapter.
USED = (0, 1, 2, 3, 4, 6, 7)


class EngineMachine(RuleBasedStateMachine):
    """Requests, cancellations and adapters in any order; every answer that comes equals the one alone."""

    weights = shelf = room = None
    known: dict = {}

    def __init__(self):
        super().__init__()
        page = 2 * 2 * 2 * 32 * 16 * 2
        self.driver = Driver(
            self.weights,
            max_num_seqs=3,
            max_loras=4,
            max_cpu_loras=4,
            lora_memory=self.room,
            kv_cache_memory=9 * page,
            max_num_batched_tokens=48,
        )
        self.requests = []
        for i in range(4):
            self.driver.engine.add_adapter(self.shelf[i], f"a{i}")
        self.meaning = {f"a{i}": i for i in range(4)}

    @rule(
        names=st.lists(st.sampled_from(["a0", "a1", "a2", "a3"]), max_size=2, unique=True),
        length=st.sampled_from([1, 31, 33, 70, 150]),
    )
    def submit(self, names, length):
        sequence = self.driver.submit(names, PROMPT[:length], SHORT)
        self.requests.append((sequence, tuple(self.meaning[name] for name in names), length))

    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: self.requests)
    @rule(i=st.integers(0, 99))
    def cancel(self, i):
        sequence, *_ = self.requests.pop(i % len(self.requests))
        self.driver.engine.cancel(sequence)

    @rule(name=st.sampled_from(["a0", "a1", "a2", "a3"]), i=st.sampled_from(USED))
    def replace(self, name, i):
        self.driver.engine.add_adapter(self.shelf[i], name)
        self.meaning[name] = i

    @rule()
    def forget(self):
        self.driver.engine.reset_prefix_cache()

    @invariant()
    def books(self):
        self.driver.engine.check_integrity()

    def teardown(self):
        self.driver.run()
        for sequence, which, length in self.requests:
            if (which, length) not in self.known:
                folders = [self.shelf[i] for i in which]
                self.known[which, length] = alone(self.weights, *folders, prompt=PROMPT[:length], params=SHORT)
            assert self.driver.trace(sequence) == self.known[which, length]
        self.driver.idle()


def test_s25_batch_slot_hygiene_any_operations_in_any_order(weights, shelf):
    EngineMachine.weights, EngineMachine.shelf = weights, shelf
    registry = Driver(weights).engine.adapters
    # Room for any two of those that it uses, but not for three large ones.
    EngineMachine.room = sum(sorted(len(registry.read(shelf[i]).packed.data) for i in USED)[-2:])
    machine = EngineMachine.TestCase
    machine.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine("runTest").runTest()
