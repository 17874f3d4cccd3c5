"""Answers as pydantic models, for the OpenAPI document. They are sent as they are made, without being validated."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"] | None


class Answer(BaseModel):
    """Base of all answers: nothing is in them that is not declared."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """What went wrong. param: the field that is at fault; code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failed(Answer):
    """The body of every error."""

    error: Error


FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": Failed, "description": text}
    for status, text in (
        (400, "The request is wrong; param names the field."),
        (401, "No valid API key."),
        (403, "This key may not do that."),
        (404, "No such model or adapter."),
        (413, "The body is too long."),
        (415, "The body is not declared as JSON."),
        (429, "Too many requests of this key; see Retry-After."),
        (431, "Too many or too long headers."),
        (500, "The request failed."),
        (503, "Too many requests, or the server is shutting down; see Retry-After."),
        (504, "The request took too long."),
    )
}


class PromptTokensDetails(Answer):
    """cached_tokens: that were found in the prefix cache."""

    cached_tokens: int


class Usage(Answer):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Answer):
    """A token and its log-probability; bytes: of its text, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token of a place, with the best ones there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry for each token of the text."""

    content: list[TokenLogprob]
    refusal: None


class TextLogprobs(Answer):
    """Lists with one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(Answer):
    """vLLM's: a token's log-probability and rank."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None] | None


class AssistantMessage(Answer):
    """The model's answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Answer):
    """One of n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """An answer to a conversation. With stream: true it comes as chat.completion.chunk events."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = None
    prompt_token_ids: list[int] | None = None


class TextChoice(Answer):
    """One of n texts of one of the prompts."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Answer):
    """Texts. With stream: true they come as events of the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(Answer):
    """A model or adapter. parent: an adapter's base; root: what it was made from."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    """The base model, by all its names, and the adapters."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokenized(Answer):
    """Token ids."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Answer):
    """A text."""

    prompt: str


class Unloaded(Answer):
    """An adapter that was unloaded."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]
