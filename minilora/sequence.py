"""The state of one text that is being generated."""

import struct
from collections.abc import Container
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple

from .lookup import PromptLookup
from .params import SamplingParams
from .registry import AdapterVersion


class State(Enum):
    """WAITING: holds no pages; RUNNING: takes part in steps; FINISHED: done, for finish_reason."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class AdapterUse(NamedTuple):
    """A version of an adapter, and the factor that this request puts on it."""

    adapter: AdapterVersion
    scale: float

    @property
    def content(self) -> tuple[str, float]:
        """What the adapter does to the numbers; it must be loaded."""
        return self.adapter.digest or "", self.scale


class TokenLogprobs(NamedTuple):
    """log-probabilities at one place. token: the one that is there, with its rank (1: the best); top: the best."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


@dataclass(slots=True)
class Times:
    """Seconds on the engine's clock: when a text was submitted, first took part in a step, got its first token, and
    its last one so far. tokens: how many it got."""

    submitted: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """One text: the prompt's tokens, then those generated.

    tenant, weight, priority: for the order of waiting; lower priorities go first. computed: tokens whose keys and
    values are in `pages`; cached: how many of them were found, not computed. drafted: how many of the last tokens are
    drafts that the next step checks. siblings: other texts of the same prompt that start as copies of this one when the
    prompt is done. holds_adapters: from the first start on. served: number of the last grant of rows, of all, that was
    its own; charged: tokens that its tenant was charged for. lookup: what may follow, from what it holds.
    """

    number: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: int
    uses: tuple[AdapterUse, ...] = ()
    salt: bytes = b""
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    siblings: list["Sequence"] = field(default_factory=list)
    state: State = State.WAITING
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token: int | None = None
    error: Exception | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    preemptions: int = 0
    drafted: int = 0
    holds_adapters: bool = False
    served: int = 0
    charged: int = 0
    times: Times = field(default_factory=Times)
    lookup: PromptLookup = field(default_factory=PromptLookup)
    _keys: list[bytes] = field(default_factory=list)

    @property
    def generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.tokens) - self.computed

    @property
    def decodes(self) -> bool:
        """Whether only its last token, and draft tokens after it, are to be computed."""
        return self.pending - self.drafted == 1

    @property
    def repeats(self) -> bool:
        """Whether its next steps are known: one token each, chosen by nothing but the logits, of which nothing else is
        wanted."""
        if self.drafted or self.siblings or not self.decodes:
            return False
        return self.params.logprobs is None and not self.params.changes_logits

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions still need their logits."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length - 1

    @property
    def adapters(self) -> list[AdapterVersion]:
        """The adapters that it uses, in their order."""
        return [use.adapter for use in self.uses]

    @property
    def draft_tokens(self) -> list[int]:
        """Those of the last tokens that the next step checks."""
        return self.tokens[len(self.tokens) - self.drafted :] if self.drafted else []

    def append(self, token: int, eos: Container[int], most: int) -> str | None:
        """Add a token to the text; returns why the text ends with it, "stop" or "length", or None where it goes on.

        eos: the model's own ends; most: tokens of prompt and text together.
        """
        self.tokens.append(token)
        if self.generated >= self.params.min_tokens:
            if token in (self.params.stop_token_ids or ()):
                self.stop_token = token
                return "stop"
            if token in eos and not self.params.ignore_eos:
                return "stop"
        return "length" if len(self.tokens) >= most else None

    def drop_drafts(self) -> list[int]:
        """Take the draft tokens back; returns them."""
        drafts = self.draft_tokens
        if drafts:
            del self.tokens[-len(drafts) :]
            self.drafted = 0
        return drafts

    def page_keys(self, page: int) -> list[bytes]:
        """The key of each full page: a digest of the adapters, the salt and all tokens up to its end.

        Adapters and salt are in the chain's root, so that texts with other ones share no page of it.
        """
        for i in range(len(self._keys), len(self.tokens) // page):
            tokens = self.tokens[i * page : (i + 1) * page]
            before = self._keys[-1] if self._keys else self._root()
            self._keys.append(blake2b(before + struct.pack(f"<{page}q", *tokens), digest_size=16).digest())
        return self._keys

    def _root(self) -> bytes:
        digest = blake2b(struct.pack("<q", len(self.salt)) + self.salt, digest_size=16)
        for use in self.uses:
            digest.update(bytes.fromhex(use.adapter.digest or "") + struct.pack("<d", use.scale))
        return digest.digest()
