"""Fields of OpenAI's and vLLM's requests that minilora does not act on: one decision about each.

Every other field is either declared in protocol.py, and has its effect, or unknown, and refused.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

# Fields that ask for something minilora does not do: refused by name, except for the values here, which ask for
# nothing. None always does.
REFUSED: dict[str, tuple[Any, ...]] = {
    # tools
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    # constrained answers
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    # other media, other services
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "include_reasoning": (False,),
    "thinking_token_budget": (),
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "moderation": (),
    "prompt_cache_retention": (),
    # other ways to sample
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
    "repetition_detection": (),
    # templates and prompts
    "chat_template": (),
    "documents": ([],),
    "continue_final_message": (False,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "prompt_embeds": (),
    # the shape of the answer
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}

# Fields that are declared in protocol.py and have no effect, because the service that they are meant for (billing,
# abuse detection, routing between caches) is not there. The text is their description in the OpenAPI document.
WITHOUT_EFFECT = {
    "user": "Accepted, of no effect: accounts are kept for API keys.",
    "metadata": "Accepted, of no effect: nothing is stored.",
    "safety_identifier": "Accepted, of no effect.",
    "prompt_cache_key": "Accepted, of no effect: prefixes are found by content; see cache_salt.",
}


def without_refused(data: Any) -> Any:
    """A request's fields without those that ask for nothing. Raises UsageError for one that is not available."""
    if not isinstance(data, Mapping):
        return data
    for name in data.keys() & REFUSED.keys():
        value = data[name]
        if value is not None and not any(type(value) is type(fine) and value == fine for fine in REFUSED[name]):
            raise UsageError(f"{name} is not supported", param=name)
    return {name: value for name, value in data.items() if name not in REFUSED}
