"""Log-probabilities in the shapes of OpenAI's two routes, and in vLLM's."""

from collections.abc import Sequence
from typing import Any

from ..outputs import CompletionOutput, Logprob, LogprobsAt
from ..tokenizer import UNFINISHED, TextStream, Tokenizer

# Probability 0 has no logarithm that JSON can say; OpenAI's answers use this number for it.
LOWEST = -9999.0


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)


def in_text(output: CompletionOutput, keep_stop: bool) -> int:
    """How many of an output's tokens belong to its text: not the one that ended it, as the model's end of text.

    keep_stop: whether one of the request's stop_token_ids does, as include_stop_str_in_output says.
    """
    ended = output.finish_reason == "stop" and not isinstance(output.stop_reason, str)
    kept = keep_stop and output.stop_reason is not None
    return len(output.token_ids) - (ended and not kept)


def for_chat(output: CompletionOutput, top: int, keep_stop: bool, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The chat route's: each token with the `top` best at its place. keep_stop: see in_text."""
    if output.logprobs is None:
        return None

    def entry(token: int, found: Logprob) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": found.decoded_token, "logprob": _number(found.logprob), "bytes": list(data)}

    content = []
    for token, at in list(zip(output.token_ids, output.logprobs, strict=True))[: in_text(output, keep_stop)]:
        best = sorted((found.rank or 0, other, found) for other, found in at.items() if (found.rank or 0) <= top)
        content.append({**entry(token, at[token]), "top_logprobs": [entry(other, found) for _, other, found in best]})
    return {"content": content, "refusal": None}


class TextLogprobs:
    """The text route's, piece by piece. offset: where the first token begins in the text, below 0 for tokens that stand
    before it; skip_special_tokens: they are not in the text."""

    def __init__(self, tokenizer: Tokenizer, offset: int, skip_special_tokens: bool):
        self._tokenizer, self._offset = tokenizer, offset
        self._stream = TextStream(tokenizer, skip_special_tokens)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[LogprobsAt | None]) -> dict[str, Any]:
        """The next tokens; one that nothing comes before has no log-probabilities."""
        offsets = []
        for token in token_ids:
            offsets.append(max(0, self._offset))
            # Of tokens that make one character together, the last one makes the text longer.
            self._offset += len(self._stream.push(token))
        return {
            "tokens": [self._shown(token) for token in token_ids],
            "token_logprobs": [
                None if at is None else _number(at[token].logprob)
                for token, at in zip(token_ids, logprobs, strict=True)
            ],
            "top_logprobs": [
                None if at is None else {self._shown(t): _number(found.logprob) for t, found in at.items()}
                for at in logprobs
            ],
            "text_offset": offsets,
        }

    def _shown(self, token: int) -> str:
        """A token's text; of a part of a character its bytes, so that different ones differ."""
        text = self._tokenizer.token(token)
        if UNFINISHED not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token))


def for_prompt(logprobs: Sequence[LogprobsAt | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's prompt_logprobs: by token id."""
    if logprobs is None:
        return None
    return [
        None
        if at is None
        else {
            str(token): {"logprob": _number(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
            for token, found in at.items()
        }
        for at in logprobs
    ]
