"""The page at /, from the files in page/, and GET /stats for its dashboard.

Files are read once. Nothing in them comes from a request, and they may load nothing but each other.
"""

import gzip
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .dashboard import Dashboard
from .failures import failure_of
from .state import ServerDep

router = APIRouter()

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Kept by the browser, which asks each time whether it changed: the answer to an ETag is short.
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class File:
    """One of the page's files. etag: weak, as it is the same for the plain and the compressed bytes."""

    content: bytes
    compressed: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """The file, or that the client has it already."""
        headers = {**HEADERS, "ETag": self.etag}
        known = [tag.strip() for tag in request.headers.get("If-None-Match", "").split(",")]
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            return Response(
                self.compressed, headers={**headers, "Content-Encoding": "gzip"}, media_type=self.media_type
            )
        return Response(self.content, headers=headers, media_type=self.media_type)


def read_files() -> dict[str, File]:
    """The page's files by name."""
    found = {}
    for place in (files(__package__) / "page").iterdir():
        kind = place.name.rpartition(".")[2]
        if kind not in TYPES:
            continue
        content = place.read_bytes()
        tag = f'W/"{blake2b(content, digest_size=12).hexdigest()}"'
        found[place.name] = File(content, gzip.compress(content, mtime=0), TYPES[kind], tag)
    return found


FILES = read_files()


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def index(request: Request) -> Response:
    """The page itself."""
    return FILES["index.html"].answer(request)


@router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """A file that the page loads."""
    if name not in FILES:
        raise HTTPException(404, "the page has no such file")
    return FILES[name].answer(request)


@router.get("/stats")
async def stats(request: Request, server: ServerDep) -> Response:
    """The dashboard's figures: a JSON document, or server-sent events once a second if the client accepts them."""
    if "text/event-stream" not in request.headers.get("Accept", ""):
        return JSONResponse(await server.dashboard.read(), headers={"Cache-Control": "no-store", "Vary": "Accept"})
    server.dashboard.check_room()
    headers = {"Cache-Control": "no-store", "Vary": "Accept", "X-Accel-Buffering": "no"}
    return StreamingResponse(follow(server.dashboard), headers=headers, media_type="text/event-stream")


async def follow(dashboard: Dashboard) -> AsyncGenerator[str]:
    """A dashboard's events; an error is the last one."""
    try:
        async with aclosing(dashboard.watch()) as documents:
            async for document in documents:
                yield f"data: {json.dumps(document)}\n\n"
    except Exception as error:
        yield f"data: {json.dumps(failure_of(error).body)}\n\n"
