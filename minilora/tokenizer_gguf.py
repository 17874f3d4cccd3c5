"""The tokenizer that a GGUF file describes, as a tokenizer.json.

GGUF names the rule that cuts text into words before the merges (`tokenizer.ggml.pre`) but does not hold it. The
rules below are those of the models' own tokenizer.json files.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import FormatError, UnsupportedError
from .tokenizer import TokenizerFiles, added

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str) -> str:
    """Words that change from lower to upper case are two."""
    return f"{_START}{_UPPER}*{_LOWER}+{ending}|{_START}{_UPPER}+{_LOWER}*{ending}"


LLAMA3 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_START}\p{{L}}+|\p{{N}}|{_REST}"
TEKKEN = rf"{_cased('')}|\p{{N}}|{_CASED_REST}"
GPT4O = rf"{_cased(_CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_CASED_REST}"

_GPT2 = ("gpt-2", "default", "mpt", "olmo", "phi-2", "exaone4")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe", "pixtral"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), QWEN2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
}
PRE_TOKENIZERS = (*_GPT2, *_DIGITS, *_PATTERNS)

# Rules whose tokenizers take a word that is itself a token whole, without merges.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_ADD_BOS = _WHOLE_WORDS
_NORMALIZED = ("qwen2", "deepseek-r1-qwen", "megrez")

# Phi-3's special tokens take the white space that follows them, but for these. GGUF does not say so; like llama.cpp we
# know such a model by its name.
_KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")

# Control tokens that end a turn or a text wherever they exist: files often name one of several, as llama.cpp knows too.
_END_TOKENS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>")
)


class _Vocabulary:
    """The token lists of a GGUF file, checked."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata
        tokens = metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise FormatError("the GGUF file holds no tokenizer.ggml.tokens")
        self.tokens: list[str] = tokens
        self.kinds = self.numbers("tokenizer.ggml.token_type", NORMAL)
        self.pre = metadata.get("tokenizer.ggml.pre") or "default"
        if not isinstance(self.pre, str):
            raise FormatError("tokenizer.ggml.pre is not a text")

    def numbers(self, key: str, default: float) -> list[Any]:
        values = self.metadata.get(key)
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, Collection):
            raise FormatError(f"{key} is not a list")
        if len(values) != len(self.tokens):
            raise FormatError(f"{key} has {len(values)} entries for {len(self.tokens)} tokens")
        return list(values)

    def special(self, name: str) -> str | None:
        """The text of the token that e.g. bos_token_id names."""
        number = self.special_id(name)
        return None if number is None else self.tokens[number]

    def special_id(self, name: str) -> int | None:
        """The id that e.g. bos_token_id holds."""
        number = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and (not isinstance(number, int) or not 0 <= number < len(self.tokens)):
            raise FormatError(f"tokenizer.ggml.{name}_token_id {number!r} is not one of {len(self.tokens)} tokens")
        return number

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise FormatError(f"tokenizer.ggml.{name} is neither true nor false")
        return value

    def ids(self) -> dict[str, int]:
        """Token -> id; of tokens that are there twice, the first."""
        found: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            found.setdefault(token, number)
        return found


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer in a GGUF file's metadata. Raises FormatError, UnsupportedError."""
    vocabulary = _Vocabulary(metadata)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    model = metadata.get("tokenizer.ggml.model")
    if not isinstance(model, str) or model not in builders:
        raise UnsupportedError(f"the GGUF file's tokenizer is of type {model!r}", f"Known: {', '.join(builders)}.")
    try:
        engine = builders[model](vocabulary)
    except (FormatError, UnsupportedError):
        raise
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"the GGUF file's tokenizer is inconsistent: {error}") from None
    _add_special(engine, vocabulary, add_bos=model == "llama" or vocabulary.pre in _ADD_BOS)
    template = metadata.get("tokenizer.chat_template")
    names = {f"{name}_token": text for name in ("bos", "eos") if (text := vocabulary.special(name)) is not None}
    return TokenizerFiles(engine.to_str(), template if isinstance(template, str) else None, names)


def end_tokens(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of all tokens that end a turn or a text: those named as such, and control tokens known to. Raises
    FormatError."""
    vocabulary = _Vocabulary(metadata)
    named = {i for name in ("eos", "eot", "eom") if (i := vocabulary.special_id(name)) is not None}
    pairs = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    known = {i for i, (token, kind) in enumerate(pairs) if kind == CONTROL and token in _END_TOKENS}
    return sorted(named | known)


def _add_special(engine: Tokenizer, vocabulary: _Vocabulary, add_bos: bool) -> None:
    name = vocabulary.metadata.get("general.name")
    phi3 = isinstance(name, str) and any(part in name.lower() for part in ("phi-3", "phi3"))
    engine.add_tokens(
        [
            added(token, special=kind == CONTROL, rstrip=phi3 and token not in _KEEP_SPACE)
            for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED) and token
        ]
    )
    before, after = [], []
    if vocabulary.flag("add_bos_token", add_bos) and (bos := vocabulary.special("bos")) is not None:
        before.append(bos)
    if vocabulary.flag("add_eos_token", False) and (eos := vocabulary.special("eos")) is not None:
        after.append(eos)
    if before or after:
        ids = vocabulary.ids()
        engine.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(token, ids[token]) for token in {*before, *after}]
        )


# ---------------------------------------------------------------- byte-level BPE


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    merges = vocabulary.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise FormatError("the GGUF file holds no tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if not all(len(pair) == 2 for pair in pairs):
        raise FormatError("tokenizer.ggml.merges: an entry is not a pair")
    whole = vocabulary.pre in _WHOLE_WORDS
    engine = Tokenizer(models.BPE(vocab=vocabulary.ids(), merges=pairs, ignore_merges=whole))
    engine.pre_tokenizer = _pre_tokenizer(vocabulary.pre)
    engine.decoder = decoders.ByteLevel()
    if vocabulary.pre in _NORMALIZED:
        engine.normalizer = normalizers.NFC()
    return engine


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if name in _GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if name in _PATTERNS:
        pieces = pre_tokenizers.Split(Regex(_PATTERNS[name]), behavior="isolated")
        return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UnsupportedError(
        f"the GGUF file's pre-tokenizer {name!r} is not known", f"Known: {', '.join(PRE_TOKENIZERS)}."
    )


# ---------------------------------------------------------------- SentencePiece


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    """BPE whose merges follow from the scores: the pair whose union scores highest is merged first."""
    unknown = vocabulary.special("unknown") or "<unk>"
    ids = vocabulary.ids()
    model = models.BPE(vocab=ids, merges=_merges(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    engine = Tokenizer(model)
    prefix = vocabulary.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    engine.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return engine


def _merges(vocabulary: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    scores = vocabulary.numbers("tokenizer.ggml.scores", 0.0)
    ranked = []
    for token, number in ids.items():
        if vocabulary.kinds[number] not in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[number], ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
