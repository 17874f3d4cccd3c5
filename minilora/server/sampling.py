"""Fields of a request as SamplingParams. Defaults are the model's own, from its generation_config.json."""

from ..errors import UsageError
from ..packed import Model
from ..params import SamplingParams
from .protocol import ChatRequest, CompletionRequest, Sampling

# Fields that have the same name and meaning on both sides.
_SAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "prompt_logprobs",
    "logit_bias",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
COMPLETION_TOKENS = 16


def for_chat(request: ChatRequest, model: Model) -> SamplingParams:
    """A chat's parameters; without a limit the answer may be as long as fits. Raises UsageError."""
    name, limit = request.limit
    try:
        return model.default_params(
            **_given(request), max_tokens=limit, logprobs=(request.top_logprobs or 0) if request.logprobs else None
        )
    except UsageError as error:
        if error.param == "max_tokens":
            error.param = name
        raise


def for_completion(request: CompletionRequest, model: Model) -> SamplingParams:
    """A text completion's parameters. Raises UsageError.

    With echo and logprobs the prompt's are computed too; no token at all is not possible: one is drawn and dropped.
    """
    given = _given(request)
    if request.echo and request.logprobs is not None:
        given["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    limit = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens or 1
    return model.default_params(**given, max_tokens=limit, logprobs=request.logprobs)


def _given(request: Sampling) -> dict:
    return {name: value for name in _SAME if (value := getattr(request, name)) is not None}
