"""S28: what is installed is what was tested, from one index only."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
SAID = [ROOT / "README.md", ROOT / "pyproject.toml", LOCK, ROOT / "tools" / "check"]
PINNED = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ; .+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def locked():
    """The locked versions of each package. There are several where they depend on Python's."""
    versions: dict[str, list[str]] = {}
    for name, version, _ in PINNED.findall(LOCK.read_text()):
        versions.setdefault(name, []).append(version)
    return versions


@pytest.mark.parametrize("path", SAID, ids=lambda path: path.name)
def test_s28_supply_no_second_index(path):
    """A second index could answer for a name that the first one has."""
    assert not re.search(r"--extra-index-url|--index-url|--find-links|--trusted-host", path.read_text())


def test_s28_supply_every_line_of_the_lock_has_a_hash(locked):
    named = re.findall(r"^([^\s#]+)==", LOCK.read_text(), re.MULTILINE)
    assert sorted(named) == sorted(name for name, versions in locked.items() for _ in versions)


def test_s28_supply_the_lock_holds_what_is_asked_for(locked):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["serve"]):
        wanted = Requirement(text)
        assert all(wanted.specifier.contains(version) for version in locked[wanted.name]), text
