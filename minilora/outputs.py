"""What generation returns, in vLLM's shape, and the text side of a sequence: decoding and stop strings."""

import os
from dataclasses import dataclass, field

from .sequence import Sequence, TokenLogprobs
from .tokenizer import TextStream, Tokenizer


@dataclass(frozen=True)
class LoRARequest:
    """An adapter for a request. lora_name: of a loaded one, or any name together with lora_path, a PEFT folder (or
    hub repo); scale: factor on the adapter's own; lora_int_id is accepted for vLLM's sake and not used."""

    lora_name: str
    lora_int_id: int = 0
    lora_path: str | os.PathLike[str] | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.lora_path is not None:
            object.__setattr__(self, "lora_path", os.fspath(self.lora_path))


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability at some place, its rank there (1: the best) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsAt = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One text. finish_reason: "stop", "length", "abort", "error" or None while it grows; stop_reason: the string or
    token."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAt] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its texts. prompt_logprobs: None for the first token, then one dict for each; error: why the
    request failed, if it did."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[LogprobsAt | None] | None = None
    lora_request: tuple[LoRARequest, ...] = ()
    num_cached_tokens: int = 0
    error: Exception | None = None


def logprobs_at(found: TokenLogprobs, tokenizer: Tokenizer) -> LogprobsAt:
    """vLLM's form: the token that is there and the best ones, by id."""
    entries = {
        token: Logprob(value, place + 1, tokenizer.token(token)) for place, (token, value) in enumerate(found.top)
    }
    entries.setdefault(found.token, Logprob(found.logprob, found.rank, tokenizer.token(found.token)))
    return entries


class TextBuilder:
    """Builds one sequence's CompletionOutput token by token."""

    def __init__(self, sequence: Sequence, index: int, tokenizer: Tokenizer):
        params = sequence.params
        self.sequence, self.output = sequence, CompletionOutput(index)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self._stops = tuple(params.stop or ())
        self._keep_stop = params.include_stop_str_in_output
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, params.skip_special_tokens)
        self._shown = self._given = self._searched = 0
        self._ended = False

    def add(self, token: int, logprobs: TokenLogprobs | None, last: bool) -> bool:
        """Take a new token, the sequence's last or not; True if a stop string ended the text with it."""
        output = self.output
        output.token_ids.append(token)
        if logprobs is not None and output.logprobs is not None:
            output.logprobs.append(logprobs_at(logprobs, self._tokenizer))
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + logprobs.logprob
        # A token that ended the text is not part of it, unless it is one of the request's own and wanted.
        ended = last and self.sequence.finish_reason == "stop"
        if not ended or (self._keep_stop and self.sequence.stop_token is not None):
            output.text += self._stream.push(token)
        if last:
            output.text += self._stream.finish()
        return self._find_stop()

    def _find_stop(self) -> bool:
        text, found = self.output.text, None
        searched, self._searched = self._searched, len(text)
        # A stop string that is complete before min_tokens never ends the text.
        if len(self.output.token_ids) < self.sequence.params.min_tokens:
            return False
        for stop in self._stops:
            at = text.find(stop, max(0, searched - len(stop) + 1))
            if at >= 0 and (found is None or (at, stop) < found):
                found = at, stop
        if found is None:
            return False
        at, stop = found
        self.output.text = self.output.text[: at + len(stop) * self._keep_stop]
        self.output.stop_reason = stop
        return True

    def finish(self) -> None:
        """Note why the text ended."""
        self.output.finish_reason = self.sequence.finish_reason
        if self.output.stop_reason is None:
            self.output.stop_reason = self.sequence.stop_token

    def _fresh(self) -> str:
        """The text since the last call that no stop string can still take back."""
        text, end = self.output.text, len(self.output.text)
        if self._stops and self.output.finish_reason is None:
            end -= max([_overlap(text, stop) for stop in self._stops])
        start, self._shown = self._shown, max(self._shown, end)
        return text[start:end]

    def delta(self) -> CompletionOutput | None:
        """What is new since the last call, in an object of its own; None if there is nothing."""
        output, start = self.output, self._given
        self._given = len(output.token_ids)
        if self._ended or (start == self._given and output.finish_reason is None):
            return None
        self._ended = output.finish_reason is not None
        return CompletionOutput(
            output.index,
            self._fresh(),
            output.token_ids[start:],
            output.cumulative_logprob,
            None if output.logprobs is None else output.logprobs[start:],
            output.finish_reason,
            output.stop_reason,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of stop that text ends with."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
