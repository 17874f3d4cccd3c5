"""The model, the adapters, and the needle: a request whose answer alone is known."""

import pytest

from ..support import LINEAR, load_weights, save_adapter
from .driver import alone


@pytest.fixture(scope="session")
def weights(tiny):
    return load_weights(tiny("llama"), "int4")


@pytest.fixture(scope="session")
def shelf(tmp_path_factory, weights):
    """Folders of adapters of several ranks on all linear layers."""
    root = tmp_path_factory.mktemp("adapters")
    ranks = (4, 8, 33, 16, 1, 64, 5, 12)
    return [save_adapter(root / f"a{i}", weights.config, rank, LINEAR[:7], seed=i) for i, rank in enumerate(ranks)]


@pytest.fixture(scope="session")
def needle(weights, shelf):
    """The needle's trace alone: adapter 2 at 0.75."""
    return alone(weights, shelf[2], scale=0.75)
