"""Packed models on disk: a folder with the arena, the tables and the tokenizer, mapped into memory when used.

    minilora.json      the tables, config.json's and generation_config.json's content, a checksum of everything
    weights.bin        the arena
    tokenizer.json, tokenizer_config.json, chat_template.jinja

`quantize` writes such a folder on purpose, `loading` keeps them in a cache.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelConfig, token_ids
from .errors import FormatError
from .files import read_json
from .memory import HUGE_PAGE, map_file
from .packer import Packer
from .params import SamplingParams
from .plan import Plan
from .tables import ANEW, check_tables
from .tokenizer import DEFINITION, SETTINGS, TEMPLATE, Tokenizer, TokenizerFiles
from .weights import Weights

MANIFEST, ARENA = "minilora.json", "weights.bin"
VERSION = 5
CHECKED_WORDS = 1 << 17


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
