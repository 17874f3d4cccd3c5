"""The parity tier runs where torch, transformers and PEFT are installed."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in str(item.path):
            item.add_marker(pytest.mark.parity)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
