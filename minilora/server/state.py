"""What all routes share."""

import time
from typing import Annotated

from fastapi import Depends, Request

from ..async_engine import AsyncEngine
from .admission import Gate
from .body import BodyReader
from .dashboard import Dashboard
from .failures import ApiError
from .metrics import Metrics
from .names import Names
from .settings import ServerConfig


class Server:
    """A running server: its engine, its options, and the parts that keep books.

    Raises UsageError where the model's own sampling defaults are wrong.

    started: when, in seconds since 1970; longest: tokens that prompt and text can have together. Handlers get it as
    a `ServerDep` parameter.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig):
        self.engine, self.config = engine, config
        # Defaults of the model that make no sense are found here, not by every request.
        engine.model.default_params()
        self.names = Names(engine, config)
        self.gate = Gate(config, engine)
        self.bodies = BodyReader(config)
        self.metrics = Metrics(engine, self.gate, self.names.base[0])
        self.dashboard = Dashboard(engine, self.names, self.gate)
        self.started = time.time()
        self.longest = min(engine.max_model_len, engine.kv_tokens)
        # No text of more characters than this can fit.
        self._most_characters = engine.tokenizer.longest_token * engine.max_model_len

    def check_length(self, characters: int, param: str) -> None:
        """Raise ApiError for a text that is too long however it is cut into tokens, before it is."""
        if characters > self._most_characters:
            raise too_long(param, f"{characters} characters can't be {self.engine.max_model_len} tokens or fewer")

    def check_tokens(self, tokens: int, param: str) -> None:
        """Raise ApiError for a prompt that leaves no room for one more token."""
        most = self.engine.max_model_len - 1
        if tokens > most:
            raise too_long(param, f"the prompt has {tokens} tokens, the model takes {most} at most")

    def check_limit(self, tokens: int, limit: int, param: str) -> None:
        """Raise ApiError where a text of so many tokens could not follow a prompt of so many."""
        if tokens + limit > (most := self.engine.max_model_len):
            asked = f"the prompt has {tokens} and {param} is {limit}"
            raise too_long(param, f"this model's maximum context length is {most} tokens, but {asked}")


def too_long(param: str, message: str) -> ApiError:
    """The error that OpenAI's clients know for a prompt that does not fit."""
    return ApiError(400, message, param, "context_length_exceeded")


async def _server(request: Request) -> Server:
    return request.app.state.server


ServerDep = Annotated[Server, Depends(_server)]
