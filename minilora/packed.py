"""Packed models on disk: a folder with the arena, the tables and the tokenizer, mapped into memory when used.

    minilora.json      the tables, config.json's and generation_config.json's content, a checksum of everything
    weights.bin        the arena
    tokenizer.json, tokenizer_config.json, chat_template.jinja

`quantize` writes such a folder on purpose, loading any other model writes one into the cache. A cached folder that is
damaged or was made from other bytes is made again; any other that is damaged raises FormatError. What the cache has for
older versions or other files of a model goes after a month without use.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minilora_kernels import pack
from minilora_kernels.code_files import cache_root

from .checkpoint import open_checkpoint
from .checkpoint.folder import INDEX
from .config import ModelConfig, token_ids
from .errors import FormatError, UsageError
from .files import read_json
from .memory import HUGE_PAGE, map_file
from .packer import Packer, pack_in_memory
from .params import SamplingParams
from .plan import DEFAULT_GROUP, Plan, Target
from .progress import Report, silent
from .tables import ANEW, check_tables
from .tokenizer import DEFINITION, SETTINGS, SPECIAL_TOKENS, TEMPLATE, Tokenizer, TokenizerFiles
from .weights import Weights

MANIFEST, ARENA = "minilora.json", "weights.bin"
VERSION = 5
CHECKED_WORDS = 1 << 17
# A checkpoint's file is recognised by this many pieces of this many bytes.
PIECES, PIECE = 32, 1 << 14
# Seconds after which a folder that is still being written counts as abandoned.
ABANDONED = 3600
# Seconds without use after which a packed model in the cache is removed when another one is packed.
UNUSED = 30 * 24 * 3600


@dataclass(frozen=True)
class Model:
    """A model ready to run. generation: the content of generation_config.json; folder: None if it is in memory only."""

    name: str
    weights: Weights
    tokenizer_files: TokenizerFiles
    generation: Mapping[str, Any]
    folder: Path | None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; it takes some 40 MB, from when it is first asked for."""
        return Tokenizer(self.tokenizer_files)

    def default_params(self, **given: Any) -> SamplingParams:
        """SamplingParams with the model's own generation_config.json where `given` is silent."""
        keys = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {k: self.generation[k] for k in keys if self.generation.get(k) is not None}
        if self.generation.get("do_sample") is False:
            found["temperature"] = 0.0
        return SamplingParams(**found | given)

    @property
    def eos(self) -> frozenset[int]:
        """All tokens that end a text: what generation_config.json, config.json and the tokenizer say, where in the
        vocabulary."""
        listed = token_ids(self.generation.get("eos_token_id"), "eos_token_id")
        own = self.tokenizer.id_of(self.tokenizer_files.names.get("eos_token", ""))
        found = {*listed, *self.weights.config.eos_token_ids, *([] if own is None else [own])}
        return frozenset(token for token in found if token < self.weights.config.vocab_size)


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


# ---------------------------------------------------------------- writing


def write_packed(folder: Path, plan: Plan, tokenizer: TokenizerFiles, replace: bool = False) -> None:
    """Write a packed model, whole or not at all.

    replace: what is there goes, unless it is a packed model: another process was faster then, and its folder stays.
    Raises OSError where there is no room or no permission, or, without replace, something in this place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # As readable as the umask makes any folder, which a temporary one would not be.
    building = folder.parent / f".{folder.name}-{secrets.token_hex(8)}"
    building.mkdir()
    try:
        _write_arena(building / ARENA, Packer(plan).chunks())
        tokenizer.save(building)
        (building / MANIFEST).write_text(json.dumps(_manifest(building, plan)))
        if replace:
            _replace_folder(building, folder)
        else:
            os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


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


def _write_arena(path: Path, chunks: Iterable[np.ndarray]) -> None:
    """Write uint8 arrays one after the other, a huge page at a time: Linux keeps such pieces in huge pages."""
    piece, filled = np.empty(HUGE_PAGE, np.uint8), 0
    with path.open("wb") as file:
        for chunk in chunks:
            at = 0
            while at < len(chunk):
                count = min(len(chunk) - at, HUGE_PAGE - filled)
                piece[filled : filled + count] = chunk[at : at + count]
                at, filled = at + count, filled + count
                if filled == HUGE_PAGE:
                    file.write(piece.data)
                    filled = 0
        file.write(piece[:filled].data)


def _replace_folder(building: Path, folder: Path) -> None:
    try:
        os.rename(building, folder)
    except OSError:
        if not folder.is_dir():
            raise
        try:
            read_packed(folder, folder.name)
            shutil.rmtree(building, ignore_errors=True)
        except (FormatError, LookupError):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(building, folder)


def _manifest(folder: Path, plan: Plan) -> dict[str, Any]:
    tables = {
        "matrices": plan.matrices.tolist(),
        "layers": plan.layers.tolist(),
        "embed": plan.embed,
        "head": plan.head,
        "final_norm": plan.final_norm,
    }
    content = {
        "version": VERSION,
        "config": dict(plan.config.source),
        "generation": dict(plan.checkpoint.generation),
        "dtype": plan.target.dtype,
        "group": plan.target.group,
        "bytes": plan.size,
        "files": {name: _file_digest(folder / name) for name in (DEFINITION, SETTINGS, TEMPLATE)},
        "checksum": checksum(_map(folder / ARENA, plan.size)),
        **tables,
    }
    return {**content, "digest": _digest(content)}


def _file_digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checksum(arena: np.ndarray) -> str:
    """A digest of sum and exclusive or over each MiB: fast enough for every start, and sees any flipped bit."""
    words = arena[: len(arena) // 8 * 8].view(np.uint64)
    digest = hashlib.sha256(arena[len(arena) // 8 * 8 :].tobytes())
    for start in range(0, len(words), CHECKED_WORDS):
        piece = words[start : start + CHECKED_WORDS]
        digest.update(np.array([np.add.reduce(piece), np.bitwise_xor.reduce(piece)], np.uint64).tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- reading


def read_packed(folder: Path, name: str) -> Model:
    """A packed model, its arena mapped into memory. Raises FormatError where it is damaged, NotFoundError if absent."""
    content = read_json(folder / MANIFEST)
    digest = content.pop("digest", None)
    if content.get("version") != VERSION or digest != _digest(content):
        raise FormatError(f"{folder / MANIFEST} is damaged or from another version of minilora", ANEW)
    if damaged := [file for file, expected in content["files"].items() if _file_digest(folder / file) != expected]:
        raise FormatError(f"{folder / damaged[0]} is damaged", ANEW)
    arena = _map(folder / ARENA, content["bytes"])
    if checksum(arena) != content["checksum"]:
        raise FormatError(f"{folder / ARENA} is damaged", ANEW)
    weights = Weights(
        ModelConfig.from_dict(content["config"]),
        arena,
        np.array(content["matrices"], np.int64),
        np.array(content["layers"], np.int64),
        content["embed"],
        content["head"],
        content["final_norm"],
    )
    check_tables(weights)
    return Model(name, weights, TokenizerFiles.from_folder(folder), content["generation"], folder)


def _map(path: Path, size: int) -> np.ndarray:
    """The file as uint8, shared with other processes until written to (which never happens)."""
    try:
        if path.stat().st_size != size:
            raise FormatError(f"{path} has {path.stat().st_size} bytes instead of {size}", ANEW)
        return map_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing", ANEW) from None
