"""Where machine code is kept: a file for each key, in a folder for each CPU, version and state of the sources.

The files hold code and pickled data (Numba's own form), so they are read only from a folder that nobody but the user
and root may write.
"""

import hashlib
import os
import stat
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import llvmlite
import numba

from . import cpu


def _sources() -> bytes:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.digest()


# Read as they are imported: an upgrade may replace them while this process runs on.
_SOURCES = _sources()


def cache_root() -> Path:
    """The folder for everything that can be made again: $MINILORA_CACHE or the platform's cache folder.

    Raises OSError for a user without a home folder.
    """
    if given := os.environ.get("MINILORA_CACHE"):
        return Path(os.path.expanduser(given))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return base / "minilora"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        raise OSError("this user has no home folder: set MINILORA_CACHE to a folder") from None


def code_folder() -> Path:
    """Where machine code for this CPU, these sources and these versions is kept."""
    return cache_root() / "kernels" / environment_key()


@cache
def environment_key() -> str:
    """A name for all that machine code depends on, apart from its own function: kernel sources, versions, CPU."""
    digest = hashlib.sha256(_SOURCES)
    triple, name, features = cpu.target()
    versions = (numba.__version__, llvmlite.__version__, sys.version_info[:2])
    switches = (numba.config.BOUNDSCHECK, str(numba.config.OPT))
    digest.update(repr((triple, name, sorted(features), versions, switches)).encode())
    return digest.hexdigest()[:24]


def code_path(name: str, key: str) -> Path:
    """The file of the function of this name with this key."""
    return code_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.code"


def sealed(data: bytes) -> bytes:
    """The data with a checksum."""
    return hashlib.sha256(data).digest() + data


def unsealed(content: bytes) -> bytes | None:
    """What `sealed` was given; None where the content is something else."""
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def read_code(path: Path) -> bytes | None:
    """The file's content, or None where it is missing, damaged or not safe to trust."""
    try:
        if reason := _distrust(path.parent):
            warnings.warn(f"{path.parent} {reason}: its machine code is not used", stacklevel=2)
            return None
        return unsealed(path.read_bytes())
    except OSError:
        return None


def write_code(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, whoever else writes it, too. Where it can't be written, a warning says so."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(sealed(data))
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        warnings.warn(
            f"cannot keep machine code in {path.parent} ({error.strerror}): every start compiles again. "
            "Set MINILORA_CACHE to a folder that can be written.",
            stacklevel=2,
        )


def _distrust(folder: Path) -> str:
    """Why a folder's code is not to be run; empty where nobody but this user and root can have written it."""
    if sys.platform == "win32":
        return ""
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()):
        return "belongs to another user"
    return "can be written by others" if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""
