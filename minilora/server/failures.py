"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.

What a client did wrong is named, with the field; what went wrong inside is logged, and told without detail.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import (
    AdapterError,
    DownloadError,
    EngineClosedError,
    EngineDeadError,
    FormatError,
    MiniloraError,
    NotFoundError,
    QueueTimeoutError,
    RequestError,
    UnloadedError,
    UnsupportedError,
    UsageError,
)

log = logging.getLogger("minilora.server")

# OpenAI's words for a status.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
LONGEST = 500
# What pydantic calls the choices of a field that takes several types.
_CHOICES = re.compile(r"bool|int|float|str|constrained-str|list\[.*\]")


class ApiError(MiniloraError):
    """What a client is told: a refused request, or in place of any other error.

    retry_after: seconds, None where trying again is of no use.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message if len(message) <= LONGEST else message[: LONGEST - 3] + "...")
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON document."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.cause, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer with status and headers."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        return JSONResponse(self.body, self.status, headers)


def draining() -> ApiError:
    """The answer to requests that a server refuses, or does not finish, while it shuts down."""
    return ApiError(503, "the server is shutting down", None, "draining", retry_after=10)


def failure_of(error: BaseException, request_id: str = "") -> ApiError:
    """What to tell about any error. One that is not the client's doing is logged here, under the request's id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UsageError):
        return ApiError(400, _said(error), error.param, "invalid_value")
    if isinstance(error, NotFoundError):
        return ApiError(404, _said(error), "model", "model_not_found")
    if isinstance(error, QueueTimeoutError):
        return ApiError(503, error.cause, None, "queue_timeout", retry_after=5)
    cause = error.__cause__ if isinstance(error, RequestError) else None
    if isinstance(cause, UnloadedError):
        return ApiError(404, cause.cause, "model", "adapter_unloaded")
    if isinstance(error, EngineClosedError):
        return draining()
    if isinstance(error, EngineDeadError):
        return ApiError(503, "the engine has stopped", None, "engine_dead", retry_after=10)
    log.error("request %s failed", request_id, exc_info=error)
    told = f"; the server's log has more under request {request_id}" if request_id else ""
    if isinstance(cause or error, AdapterError | FormatError | UnsupportedError | DownloadError):
        return ApiError(500, f"the adapter could not be loaded{told}", "model", "adapter_error")
    return ApiError(500, f"the request failed{told}", None, "internal_error")


def _said(error: MiniloraError) -> str:
    return f"{error.cause}. {error.remedy}" if error.remedy else error.cause


@contextmanager
def about(param: str) -> Iterator[None]:
    """Errors of the block that name no field are about this one."""
    try:
        yield
    except UsageError as error:
        error.param = error.param or param
        raise


def invalid(error: RequestValidationError) -> ApiError:
    """The first thing that pydantic objects to. The input is described, never repeated."""
    first = _first(error.errors())
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UsageError):
        return failure_of(cause)
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", None, "invalid_json")
    *way, last = [str(part) for part in first["loc"][1:]] or [""]
    way = [part for part in way if not _CHOICES.fullmatch(part)]
    unknown = first["type"] == "extra_forbidden"
    place = [*way, last] if unknown or not _CHOICES.fullmatch(last) else way
    where, param = ".".join(place)[:100], place[0][:100] or None
    if unknown:
        return ApiError(400, f"unknown field {where!r}", param, "unknown_field")
    return ApiError(400, f"{where or 'the body'}: {first['msg']}", param, "invalid_value")


def _first(errors: Sequence[Any]) -> Any:
    """The first error. A field that takes a text or a list has one for each: the list's, if it lies inside the list."""
    first = errors[0]
    field = first["loc"][:-1]
    if first["loc"][-1:] != ("str",) or first["type"] == "extra_forbidden":
        return first
    return max((e for e in errors if e["loc"][: len(field)] == field), key=lambda e: len(e["loc"]))


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return invalid(error).response()


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: unknown paths and methods."""
    if not isinstance(error, HTTPException):
        raise error
    response = ApiError(error.status_code, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    return failure_of(error, request.scope.get("state", {}).get("request_id", "")).response()


def install(app: FastAPI) -> None:
    """Have an application answer every error in this shape."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    for kind in (MiniloraError, Exception):
        app.add_exception_handler(kind, _on_error)
