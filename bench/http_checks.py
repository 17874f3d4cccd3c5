"""What bench/soak_http.py asks for, and whether the answers are right. Opens no connections."""

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from http_client import Answer

# Gauges of /metrics that are 0 where the server holds nothing.
IDLE = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "minilora:adapters_in_use",
)
# Spans of time whose lowest values are compared to find growth.
WINDOWS = 20
SHARED_PREFIX = list(range(100, 200))


def draw_request(rng: random.Random, base: str, names: Sequence[str], options) -> dict:
    """A random completion request: on the base model, one adapter or up to three with scales; streamed or not.

    options: prompt and generate, spans of tokens; vocab_size.
    """
    start = SHARED_PREFIX if rng.random() < 0.5 else []
    body = {
        "model": base,
        "prompt": start + [rng.randrange(3, options.vocab_size) for _ in range(rng.randint(*options.prompt))],
        "max_tokens": rng.randint(*options.generate),
        "temperature": rng.choice([0.0, 0.8]),
        "seed": rng.randrange(1 << 30),
        "ignore_eos": rng.random() < 0.9,
        "return_token_ids": True,
        "stream": rng.random() < 0.5,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    kind = rng.random()
    if names and kind < 0.5:
        body["model"] = rng.choice(names)
    elif names and kind < 0.8:
        chosen = rng.sample(names, rng.randint(1, min(3, len(names))))
        body["lora"] = [{"name": name, "scale": rng.choice([0.5, 1.0, -0.25])} for name in chosen]
    return body


def adapters_of(body: dict, base: str) -> list[tuple[str, float]]:
    """(name, scale) of the adapters that a request uses."""
    if body["model"] != base:
        return [(body["model"], 1.0)]
    return [(use["name"], use["scale"]) for use in body.get("lora", ())]


def repetition(body: dict, base: str, versions: Sequence[str]) -> dict:
    """The same request, not streamed, on these adapters in place of its own."""
    again = {key: value for key, value in body.items() if key not in ("stream_options", "lora")}
    uses = zip(versions, adapters_of(body, base), strict=True)
    lora = [{"name": version, "scale": scale} for version, (_, scale) in uses]
    return {**again, "model": base, "stream": False, **({"lora": lora} if lora else {})}


@dataclass
class Reply:
    """What an answer says. error: "" or the error's code; whole: its end is not missing."""

    model: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict | None = None
    error: str = ""
    whole: bool = True


def read(answer: Answer) -> Reply:
    """The reply in an answer, which may be a stream that its client left. Raises ValueError where it is not JSON."""
    reply = Reply()
    if answer.headers.get("content-type", "").startswith("text/event-stream"):
        parts = [event for _, event in answer.events()]
        reply.whole = answer.body.endswith(b"data: [DONE]\n\n")
    else:
        parts = [json.loads(answer.body)]
    for part in parts:
        if "error" in part:
            reply.error = part["error"]["code"] or part["error"]["type"]
        reply.model = part.get("model", reply.model)
        reply.usage = part.get("usage") or reply.usage
        for choice in part.get("choices", ()):
            reply.tokens += choice["token_ids"]
            reply.finish_reason = choice["finish_reason"] or reply.finish_reason
    return reply


def times_of(answer: Answer) -> list[float]:
    """When each piece of an answer's text came; keep-alive comments are not pieces, a document is one."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        return [answer.pieces[-1][0]]
    return [when for when, event in answer.events() if event.get("choices")]


def waited_too_long(reply: Reply) -> bool:
    """Whether the request timed out in the queue, before any of its text."""
    return reply.error == "queue_timeout" and not reply.tokens


def fault(body: dict, reply: Reply) -> str:
    """What is wrong with the reply to a request that was let in; "" for nothing."""
    count, asked = len(reply.tokens), len(body["prompt"])
    if reply.error:
        return f"an error after it began: {reply.error}"
    if not reply.whole:
        return "its end is missing"
    if reply.model != body["model"]:
        return f"it is from {reply.model!r}, not {body['model']!r}"
    least = 1 if reply.finish_reason == "stop" and not body["ignore_eos"] else body["max_tokens"]
    if reply.finish_reason not in ("stop", "length") or not least <= count <= body["max_tokens"]:
        return f"{count} of {body['max_tokens']} tokens, then {reply.finish_reason!r}"
    expected = {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}
    if {key: (reply.usage or {}).get(key) for key in expected} != expected:
        return f"usage {reply.usage}, where {expected} was used"
    return ""


def is_clean_refusal(answer: Answer) -> bool:
    """Whether an answer says, in the documented form, that there is no room now."""
    if answer.status not in (429, 503) or not answer.headers.get("retry-after", "").isdecimal():
        return False
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, LookupError, TypeError):
        return False
    return set(error) == {"message", "type", "param", "code"} and int(answer.headers["retry-after"]) >= 1


def held(metrics: str) -> dict[str, float]:
    """IDLE's gauges that are not 0 in a document of /metrics, which has all of them."""
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in metrics.splitlines() if "{" in line}
    return {name: values[name] for name in IDLE if values[name]}


def slope(samples: Sequence[tuple[float, float]], warm_up: float) -> float | None:
    """Growth per minute of (seconds, value) after the first `warm_up` seconds; None where there are too few samples.

    It is the slope through the lowest values of WINDOWS spans of time: what comes and goes is not growth.
    """
    late = [(seconds, value) for seconds, value in samples if seconds >= warm_up]
    size = len(late) // WINDOWS
    if not size:
        return None
    floors = [min(late[i : i + size], key=lambda sample: sample[1]) for i in range(0, size * WINDOWS, size)]
    return 60 * statistics.linear_regression(*zip(*floors, strict=True)).slope
