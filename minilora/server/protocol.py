"""Requests as pydantic models: OpenAI's fields and vLLM's, each declared here or decided on in fields.py.

Types are strict (no text or boolean for a number), numbers finite, lists and texts of bounded length; the ranges of
sampling parameters are checked by SamplingParams. Unknown fields are errors; null is as if a field were not given.

Pydantic makes an error of everything that is wrong, a kilobyte each, while all other clients wait. Therefore lists are
fail_fast, dicts are counted before their items are looked at, and of unknown fields only the first is reported.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from ..errors import UsageError
from ..params import LONGEST_STOP, MOST_BIASES, MOST_LORAS, MOST_SEQUENCES, MOST_STOPS
from .fields import WITHOUT_EFFECT, without_refused

MOST_PROMPTS = 1024
MOST_MESSAGES = 2048
MOST_PARTS = 256
MOST_TOP_LOGPROBS = 20
LONGEST_LABEL = 256

Label = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_LABEL)]
ModelName = Annotated[str, StringConstraints(max_length=512)]
Prompt = str | list[int]


def _at_most(items: int) -> BeforeValidator:
    """Refuses a dict of more items."""

    def count(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > items:
            raise PydanticCustomError("too_long", "Dictionary should have at most {most} items", {"most": items})
        return value

    return BeforeValidator(count)


class Strict(BaseModel):
    """Base of all requests."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, data: Any) -> Any:
        fields = cls.model_fields
        if not isinstance(data, dict) or (first := next((name for name in data if name not in fields), None)) is None:
            return data
        return {first: data[first], **{name: data[name] for name in fields if name in data}}


class StreamOptions(Strict):
    """include_usage: a last chunk with the usage; continuous_usage_stats: the usage so far in every chunk."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: Literal[False] | None = Field(None, description="Only false: chunks are not padded.")


class LoraUse(Strict):
    """An adapter of a request, and the factor on its own scale."""

    name: ModelName
    scale: float | None = Field(None, ge=-100, le=100, description="1 if not given.")


class Sampling(Strict):
    """What chat and text completions have in common."""

    model: ModelName | None = Field(None, description="The base model, an adapter, or base:adapter.")
    lora: list[LoraUse] | None = Field(
        None,
        max_length=MOST_LORAS,
        fail_fast=True,
        description="Adapters with scales, applied together; model is the base model then.",
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = Field(None, ge=1, le=MOST_SEQUENCES)
    seed: int | None = None
    stop: (
        str
        | Annotated[
            list[Annotated[str, StringConstraints(max_length=LONGEST_STOP)]],
            Field(max_length=MOST_STOPS, fail_fast=True),
        ]
    ) | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MOST_BIASES), _at_most(MOST_BIASES)] | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_BIASES, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    priority: int | None = Field(
        None, ge=-(1 << 31), lt=1 << 31, description="Lower goes first, 0 if not given; below 0 needs an admin key."
    )
    cache_salt: Label | None = Field(None, description="Cached prefixes are shared within one salt only.")
    request_id: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,128}$")] | None = Field(
        None, description="Becomes part of the answer's id; need not be unique."
    )
    return_token_ids: bool | None = None
    # without effect
    user: str | None = Field(None, max_length=LONGEST_LABEL, description=WITHOUT_EFFECT["user"])
    metadata: dict[str, Any] | None = Field(None, max_length=16, description=WITHOUT_EFFECT["metadata"])
    safety_identifier: str | None = Field(
        None, max_length=LONGEST_LABEL, description=WITHOUT_EFFECT["safety_identifier"]
    )
    prompt_cache_key: str | None = Field(None, max_length=LONGEST_LABEL, description=WITHOUT_EFFECT["prompt_cache_key"])

    @model_validator(mode="before")
    @classmethod
    def _without_refused(cls, data: Any) -> Any:
        return without_refused(data)

    @model_validator(mode="after")
    def _check_stream_options(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise UsageError("stream_options needs stream: true", param="stream_options")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """The field that says how many tokens a text may have, and what it says."""
        return "max_tokens", self.max_tokens

    @property
    def usage_at_end(self) -> bool:
        """Whether the stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_chunks(self) -> bool:
        """Whether every chunk says the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


# ---------------------------------------------------------------- chat


class TextPart(Strict):
    """A part of a message's content. Other types than text are not supported."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """A message. developer is another word for system; the fields after name are in answers that clients send back,
    and must be empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MOST_PARTS, fail_fast=True)]
    name: Label | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_parts(cls, data: Any) -> Any:
        parts = data.get("content") if isinstance(data, dict) else None
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UsageError(f"content of type {kind[:40]!r} is not supported, only text is", param="messages")
        return data

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content, **({"name": self.name} if self.name is not None else {})}


Scalar = bool | int | float | Annotated[str, StringConstraints(max_length=1024)] | None


class ChatTemplateOptions(Strict):
    """What a request may say about the rendering of its messages."""

    add_generation_prompt: bool | None = Field(None, description="True if not given.")
    chat_template_kwargs: Annotated[dict[Label, Scalar], Field(max_length=16), _at_most(16)] | None = Field(
        None, description="Variables for the model's chat template, such as enable_thinking."
    )


class ChatRequest(Sampling, ChatTemplateOptions):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = None
    max_tokens: int | None = Field(None, description="Older name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    add_special_tokens: Literal[False] | None = Field(None, description="Only false: the template writes them.")

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise UsageError("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
        return self

    @property
    def limit(self) -> tuple[str, int | None]:
        """See Sampling."""
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens


# ---------------------------------------------------------------- completions


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[Prompt]:
    """OpenAI's four forms of a prompt as a list of texts or token ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if not isinstance(value, list) or not value or len(value) > MOST_PROMPTS:
        raise UsageError(f"prompt must be a text, token ids, or up to {MOST_PROMPTS} of these", param="prompt")
    if not all(isinstance(prompt, str) for prompt in value) and not all(_is_ids(prompt) for prompt in value):
        raise UsageError("a list of prompts must hold texts only, or lists of token ids only", param="prompt")
    return value


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Prompt], PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
    ]
    max_tokens: int | None = Field(None, description="16 if not given; 0 with echo.")
    echo: bool | None = False
    add_special_tokens: bool | None = Field(None, description="True if not given.")
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check_echo(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise UsageError("max_tokens must be 1 or more, or 0 with echo", param="max_tokens")
        return self


# ---------------------------------------------------------------- tokens and adapters


class TokenizeRequest(ChatTemplateOptions):
    """POST /tokenize: a text, or a conversation as /v1/chat/completions would see it."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(None, description="Of a prompt; true if not given.")
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _check_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise UsageError("give either prompt or messages", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise UsageError("the chat template writes the special tokens of messages", param="add_special_tokens")
        for name in ("add_generation_prompt", "chat_template_kwargs") if self.messages is None else ():
            if getattr(self, name) is not None:
                raise UsageError(f"{name} needs messages", param=name)
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: ModelName | None = None
    tokens: list[int] = Field(max_length=1 << 20, fail_fast=True)


class LoadRequest(Strict):
    """POST /v1/load_lora_adapter. load_inplace: it may replace an adapter of that name."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = False


class UnloadRequest(Strict):
    """POST /v1/unload_lora_adapter. force: end the requests that use it, instead of letting them finish."""

    lora_name: str
    lora_int_id: int | None = Field(None, description="Accepted, of no effect: adapters go by name.")
    force: bool | None = False
