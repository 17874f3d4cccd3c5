"""Fixtures: tiny random models, and the default model for tests marked `real`."""

import os
import signal

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest

from minilora.checkpoint.resolve import resolve_model
from minilora.loading import load_model
from minilora_kernels.code_files import cache_root

from .side_runs import SideRuns, is_side_run
from .support import ARCHITECTURES, make_checkpoint


def pytest_sessionstart():
    """In the background a shell has its programs ignore interrupts, and they their children: not those that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Tests that wait for a run beside the others come last."""
    items.sort(key=is_side_run)


@pytest.fixture(scope="session", autouse=True)
def _side_runs(request):
    """The long runs of the tests that were chosen, from the first test on."""
    runs = SideRuns(request.session.items)
    yield runs
    runs.end()


@pytest.fixture
def side_run(request, _side_runs):
    """The process, once it has ended, that the test's mark `side_run(*arguments, **environment)` asks for."""
    return _side_runs.result(request.node)


@pytest.fixture(scope="session", autouse=True)
def _no_packed_models_left_behind(tmp_path_factory):
    """Compiled kernels and downloads are kept from run to run, packed models of the tests are not."""
    kept, root = cache_root(), tmp_path_factory.mktemp("cache")
    for name in ("kernels", "models"):
        (kept / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(kept / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILORA_CACHE", str(root))
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function: architecture name (a key of support.ARCHITECTURES) -> folder of a random checkpoint."""
    made = {}

    def get(name="llama"):
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), **ARCHITECTURES[name])
        return made[name]

    return get


@pytest.fixture(scope="session")
def real_model():
    """The default model, fetched on first use."""
    return load_model(resolve_model("smollm2-135m-instruct", print), "smollm2-135m-instruct")
