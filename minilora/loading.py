"""Loading models: packed folders as they are, all others through a cache of packed folders.

A cached folder that is damaged or was made from other bytes is made again; any other that is damaged raises
FormatError. What the cache has for older versions or other files of a model goes after a month without use.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from minilora_kernels import pack
from minilora_kernels.code_files import cache_root

from .checkpoint import open_checkpoint
from .checkpoint.folder import INDEX
from .errors import FormatError, UsageError
from .files import read_json
from .packed import MANIFEST, VERSION, Model, read_packed, write_packed
from .packer import pack_in_memory
from .plan import DEFAULT_GROUP, Plan, Target
from .progress import Report, silent
from .tokenizer import DEFINITION, SETTINGS, SPECIAL_TOKENS, TEMPLATE, TokenizerFiles

# A checkpoint's file is recognised by this many pieces of this many bytes.
PIECES, PIECE = 32, 1 << 14
# Seconds after which a folder that is still being written counts as abandoned.
ABANDONED = 3600
# Seconds without use after which a packed model in the cache is removed when another one is packed.
UNUSED = 30 * 24 * 3600


def load_model(path: Path, name: str, target: Target | None = None, report: Report = silent) -> Model:
    """A model from a checkpoint or a packed folder; a checkpoint is packed into the cache unless it is there.

    Raises NotFoundError, FormatError or UnsupportedError. Where the cache can't be written it says so and keeps
    the packed weights in memory.
    """
    target = target or Target()
    try:
        if (path / MANIFEST).exists():
            _check_target(path, target)
            return read_packed(path, name)
        folder = cache_root() / "packed" / f"{path.name.lstrip('.')}-{_key(path, target)}"
    except PermissionError as error:
        raise FormatError(f"{error.filename or path} may not be read by this user", "Change its permissions.") from None
    try:
        model = read_packed(folder, name)
    except (FormatError, LookupError, OSError):
        pass
    else:
        _note_use(folder)
        return model
    checkpoint = open_checkpoint(path)
    report(f"packing {name} ({target.dtype})")
    plan = Plan(checkpoint, target)
    tokenizer = checkpoint.tokenizer()
    if (kept := _keep(folder, name, plan, tokenizer, report)) is not None:
        return kept
    return Model(name, pack_in_memory(plan), tokenizer, checkpoint.generation, None)


def _check_target(path: Path, target: Target) -> None:
    """Raise UsageError where a packed folder is asked for in another format than its own."""
    if target.dtype == "auto":
        return
    content = read_json(path / MANIFEST)
    dtype, group = content.get("dtype"), content.get("group")
    if target.dtype != dtype or target.group not in (group, DEFAULT_GROUP):
        raise UsageError(
            f"{path} was packed as {dtype} with groups of {group}, which can't be changed",
            "Leave --dtype and --group-size out, or quantize its source again.",
        )


def _keep(folder: Path, name: str, plan: Plan, tokenizer: TokenizerFiles, report: Report) -> Model | None:
    """The model, written into the cache and read from there; None, and a report, where that is not possible."""
    try:
        _remove_old(folder.parent)
        write_packed(folder, plan, tokenizer, replace=True)
    except OSError as error:
        report(
            f"cannot keep the packed model in {folder.parent} ({error.strerror}): it is packed anew at each start. "
            "Set MINILORA_CACHE to a folder with room."
        )
        return None
    try:
        return read_packed(folder, name)
    except (FormatError, LookupError, OSError) as error:
        # Another process that saw a damaged folder in this place may be replacing it just now.
        report(f"cannot read what was just packed, which is kept in memory: {error}")
        return None


def _key(path: Path, target: Target) -> str:
    """A digest of what the packed bytes depend on: which files, their sizes and times, the target, our version.

    Some pieces of each file count too: other weights of the same shapes may have the same times, as archives set them.
    Pieces, so that a start from the cache need not read a checkpoint whole. VERSION is that of the folder.
    """
    digest = hashlib.sha256(repr((VERSION, _makers(), *target.key)).encode())
    for file in _sources(path):
        status = file.stat()
        digest.update(repr((str(file.resolve()), status.st_size, status.st_mtime_ns)).encode())
        for piece in _pieces(file, status.st_size):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    """All of a small file, and of a larger one PIECES pieces, from its beginning to its end."""
    with path.open("rb") as file:
        if size <= PIECES * PIECE:
            yield file.read()
            return
        for i in range(PIECES):
            file.seek((size - PIECE) * i // (PIECES - 1))
            yield file.read(PIECE)


@cache
def _makers() -> str:
    """A digest of the sources that decide what is packed, and what a GGUF file's config and tokenizer become."""
    here, kernels = Path(__file__).parent, Path(pack.__file__).parent
    names = ("config", "config_keys", "packed", "packer", "plan", "rope", "tokenizer", "tokenizer_gguf")
    files = [*sorted(here.glob("checkpoint/*.py")), *(here / f"{name}.py" for name in names)]
    files += [kernels / f"{name}.py" for name in ("convert", "floats", "formats", "pack", "quantize", "quantized")]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _sources(path: Path) -> list[Path]:
    """The files that a checkpoint may be read from."""
    if path.is_file():
        return [path]
    names = (INDEX, "config.json", "generation_config.json", DEFINITION, SETTINGS, SPECIAL_TOKENS, TEMPLATE)
    files = [*sorted(path.glob("*.safetensors")), *(path / name for name in names)]
    return [file for file in files if file.exists()]


def _note_use(folder: Path) -> None:
    """Date a folder of the cache to now; one that may not be written is left to those who may."""
    with suppress(OSError):
        os.utime(folder)


def _remove_old(cache: Path) -> None:
    """Remove what killed processes have left half written, and models that nobody has used for long.

    A process that runs one of these keeps what it has mapped.
    """
    for building in cache.glob(".*-" + 16 * "[0-9a-f]"):
        _remove_older(building, ABANDONED)
    for manifest in cache.glob("[!.]*/" + MANIFEST):
        _remove_older(manifest.parent, UNUSED)


def _remove_older(folder: Path, seconds: float) -> None:
    """Remove a folder that, with all in it, is older than this many seconds, unless another process is doing so."""
    with suppress(FileNotFoundError):
        newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
        if time.time() - newest > seconds:
            shutil.rmtree(folder, ignore_errors=True)
