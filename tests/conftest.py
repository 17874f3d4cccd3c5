"""Fixtures: tiny random models, and the default model for tests marked `real`."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest

from minilora.checkpoint.lock import resolve_model
from minilora.packed import load_model

from .support import ARCHITECTURES, make_checkpoint


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
