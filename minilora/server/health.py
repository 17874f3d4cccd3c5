"""Whether the server lives and may be sent requests, what Prometheus reads, and the version.

The first two need no key and tell no detail: load balancers have no key.
"""

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from .. import __version__
from ..errors import EngineDeadError
from .answers import FAILURES
from .failures import draining
from .state import Server, ServerDep

# A step of the engine that takes longer, even if it compiles on first use, will never end.
LONGEST_STEP = 300.0

router = APIRouter()


def check_alive(server: Server) -> None:
    """Raise EngineDeadError where the engine is dead or stuck."""
    if (dead := server.engine.dead) is not None:
        raise dead.copy()
    if server.engine.stuck_for > LONGEST_STEP:
        raise EngineDeadError("a step of the engine does not end")


@router.head("/health", include_in_schema=False)
@router.get("/health", response_class=Response, responses=FAILURES)
async def health(server: ServerDep) -> Response:
    """200 while the engine lives, else 503: restart the process."""
    check_alive(server)
    return Response()


@router.head("/ready", include_in_schema=False)
@router.get("/ready", response_class=Response, responses=FAILURES)
async def ready(server: ServerDep) -> Response:
    """200 while new requests are welcome, 503 when the server is shutting down or its engine is dead."""
    check_alive(server)
    if server.gate.draining:
        raise draining()
    return Response()


@router.get("/metrics", response_class=PlainTextResponse, responses=FAILURES)
async def metrics(server: ServerDep) -> Response:
    """Counters, gauges and histograms, for Prometheus."""
    return Response(await server.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses=FAILURES)
async def version() -> dict[str, str]:
    """The version of minilora."""
    return {"version": __version__}
