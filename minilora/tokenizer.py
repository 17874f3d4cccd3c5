"""Text to token ids and back: the tokenizers library, with tokenizer.json from a folder or made from a GGUF file."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Engine
from tokenizers.decoders import ByteLevel

from .errors import FormatError, UsageError
from .files import read_json, read_text

DEFINITION = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"

UNFINISHED = "\ufffd"

# Put into the name of a special token, these mark it as just text: Unicode reserves them for use within a program.
_MENTION = "\ufdd0\ufdd1"


@dataclass(frozen=True)
class TokenizerFiles:
    """What defines a tokenizer: the text of tokenizer.json, the chat template if there is one, and the names of
    special tokens that templates use (bos_token and the like)."""

    definition: str
    chat_template: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> "TokenizerFiles":
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja.

        Raises NotFoundError, FormatError.
        """
        create = f"Create it with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained({str(folder)!r})."
        definition = read_text(folder / DEFINITION, create)
        settings, special = (
            read_json(folder / name) if (folder / name).exists() else {} for name in (SETTINGS, SPECIAL_TOKENS)
        )
        return cls(definition, _template(folder, settings), _names(special) | _names(settings))

    def save(self, folder: Path) -> None:
        """Write a folder that from_folder reads the same from."""
        (folder / DEFINITION).write_text(self.definition, encoding="utf-8")
        (folder / SETTINGS).write_text(json.dumps(dict(self.names), indent=2), encoding="utf-8")
        if self.chat_template is not None:
            (folder / TEMPLATE).write_text(self.chat_template, encoding="utf-8")


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / TEMPLATE).exists():
        return read_text(folder / TEMPLATE)
    value = settings.get("chat_template")
    if isinstance(value, list):
        by_name = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = by_name.get("default")
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{folder / SETTINGS}: chat_template is not a text")
    return value


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found


class Tokenizer:
    """Encodes and decodes. Thread-safe."""

    def __init__(self, files: TokenizerFiles):
        self._engine = _engine(files.definition)
        self.files = files
        self._pieces: dict[tuple[int, bool], str] = {}
        self._tokens: dict[int, str] = {}
        # Byte-level tokens simply follow each other; other decoders look at a token's neighbours.
        self.joins = isinstance(self._engine.decoder, ByteLevel)
        self.special_tokens: dict[str, int] = {
            token.content: number for number, token in self._engine.get_added_tokens_decoder().items() if token.special
        }

    @cached_property
    def longest_token(self) -> int:
        """Most characters of a text that one token can stand for."""
        longest = max(map(len, self._engine.get_vocab(with_added_tokens=True)))
        # Normalizers may join a few characters to one.
        return 4 * longest if self._engine.normalizer else longest

    @cached_property
    def _anchor(self) -> list[int]:
        """A token that is a word, to decode another one after it, so that this is not taken for a text's first."""
        for number in range(0 if self.joins else self._engine.get_vocab_size()):
            name, text = self._engine.id_to_token(number) or "<", self.piece(number, False)
            # Tokens for single bytes are joined with their neighbours.
            if not name.startswith("<") and text.isascii() and text.isalnum():
                return [number]
        return []

    @cached_property
    def _engine_for_mentions(self) -> Engine:
        """Looks for special tokens in the text as it is, and only then takes the marks of as_plain out of it."""
        engine = _engine(self.files.definition)
        unmark = normalizers.Replace(_MENTION, "")
        engine.normalizer = normalizers.Sequence([unmark, engine.normalizer] if engine.normalizer else [unmark])
        for token in engine.get_added_tokens_decoder().values():
            if token.special and token.normalized:
                sides = {"single_word": token.single_word, "lstrip": token.lstrip, "rstrip": token.rstrip}
                engine.add_special_tokens([AddedToken(token.content, normalized=False, special=True, **sides)])
        return engine

    def encode(self, text: str, add_special_tokens: bool = True, marked: bool = False) -> list[int]:
        """Ids of a text in which special tokens count as such.

        add_special_tokens: with those that the tokenizer adds itself; marked: except for those that as_plain has
        marked.
        """
        engine = self._engine_for_mentions if marked and _MENTION in text else self._engine
        # Unlike `encode`, this lets other threads go on meanwhile: a text of a megabyte takes seconds.
        [found] = engine.encode_batch_fast([_valid(text)], add_special_tokens=add_special_tokens)
        return found.ids

    def as_plain(self, text: str) -> str:
        """A text, for encode with `marked`, in which the names of special tokens are just text."""
        # A mark of the text's own is marked in its middle, so that it stays.
        text = text.replace(_MENTION, _MENTION[0] + _MENTION + _MENTION[1:])
        for name in self.special_tokens:
            # Names overlap in texts such as <<s><s>: each time one fewer is left.
            while len(name) > 1 and name in text:
                text = text.replace(name, name[0] + _MENTION + name[1:])
        return text

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; incomplete characters come out as U+FFFD."""
        return self._engine.decode(ids, skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int, skip_special_tokens: bool) -> str:
        """The text of one token as the only one of a text, remembered."""
        key = (token_id, skip_special_tokens)
        if (found := self._pieces.get(key)) is None:
            found = self._pieces[key] = self.decode([token_id], skip_special_tokens)
        return found

    def token(self, token_id: int) -> str:
        """The text of one token within a text, remembered: with the space that some decoders drop at a text's start."""
        if (found := self._tokens.get(token_id)) is None:
            start = len(self.decode(self._anchor, skip_special_tokens=False))
            found = self.decode([*self._anchor, token_id], skip_special_tokens=False)[start:]
            self._tokens[token_id] = found
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token within a text, also where it is a part of a character only."""
        text = self.token(token_id)
        piece = self._engine.id_to_token(token_id) or ""
        if UNFINISHED not in text:
            return text.encode()
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        table = _byte_table()
        return bytes(table[c] for c in piece) if all(c in table for c in piece) else text.encode()

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact name."""
        return self._engine.token_to_id(token)


@cache
def _byte_table() -> dict[str, int]:
    """The letters that byte-level tokenizers write for bytes: printable ones for themselves, others from U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


def _engine(definition: str) -> Engine:
    try:
        engine = Engine.from_str(definition)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{DEFINITION} is not a tokenizer: {error}") from None
    engine.no_padding()
    engine.no_truncation()
    return engine


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("the text holds half a surrogate pair, which is not valid Unicode") from None
    return text


class TextStream:
    """Turns ids into text as they come, holding back characters that are not complete yet."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer, self._decode, self._skip = tokenizer, tokenizer.decode, skip_special_tokens
        self._ids: list[int] = []
        self._from = self._shown = 0
        # The text of ids[_from:_shown].
        self._before = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token_id)
        if self._tokenizer.joins and self._shown == len(self._ids) - 1:
            piece = self._tokenizer.piece(token_id, self._skip)
            if UNFINISHED not in piece:
                self._from, self._shown, self._before = self._shown, len(self._ids), piece
                return piece
        return self._advance(final=False)

    def finish(self) -> str:
        """What is still held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        # Decoding starts one shown piece back: some decoders treat a text's first token differently.
        text, before = self._decode(self._ids[self._from :], self._skip), len(self._before)
        if len(text) <= before or (text.endswith(UNFINISHED) and not final):
            return ""
        new = text[before:]
        self._from, self._shown = self._shown, len(self._ids)
        self._before = self._piece()
        return new

    def _piece(self) -> str:
        """The text of what was shown last, by itself; of single tokens it is kept."""
        if self._shown - self._from != 1:
            return self._decode(self._ids[self._from : self._shown], self._skip)
        return self._tokenizer.piece(self._ids[self._from], self._skip)


def added(text: str, special: bool, rstrip: bool = False) -> AddedToken:
    """A token that is matched whole, before anything else. rstrip: with the white space that follows it."""
    return AddedToken(text, special=special, normalized=False, rstrip=rstrip)
