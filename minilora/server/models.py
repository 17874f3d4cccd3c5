"""/v1/models, and loading and unloading of adapters at run time."""

from typing import Any

from fastapi import APIRouter, Depends, Request

from .answers import FAILURES, ModelCard, ModelList, Unloaded
from .failures import ApiError
from .protocol import LoadRequest, UnloadRequest
from .state import Server, ServerDep

router = APIRouter()


def _check_admin(request: Request, server: ServerDep) -> None:
    """Raise ApiError where adapters can't be loaded at run time, or not by this caller."""
    if not request.scope["state"]["admin"]:
        cause = "loading and unloading adapters needs --enable-runtime-lora and an admin key"
        raise ApiError(403, cause, None, "admin_key_required")
    if not server.config.enable_runtime_lora:
        raise ApiError(403, "loading adapters at run time is off; see --enable-runtime-lora", None, "not_enabled")


ADMINS_ONLY = [Depends(_check_admin)]


@router.get("/v1/models", response_model=ModelList, responses=FAILURES)
async def list_models(server: ServerDep) -> dict[str, Any]:
    """The names that requests may use."""
    names = [*server.names.base, *(await server.names.listed())]
    return {"object": "list", "data": [_card(server, name) for name in names]}


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=FAILURES)
async def retrieve_model(model: str, server: ServerDep) -> dict[str, Any]:
    """One of these names."""
    chosen = await server.names.resolve(model)
    return _card(server, chosen.loras[0].lora_name if chosen.loras else model)


def _card(server: Server, name: str) -> dict[str, Any]:
    names = server.names
    base, known = name in names.base, names.known.get(name)
    return {
        "id": name,
        "object": "model",
        "created": known.created if known else int(server.started),
        "owned_by": "minilora",
        "root": names.root if base else known.root if known else name,
        "parent": None if base else names.base[0],
        "max_model_len": server.engine.max_model_len,
    }


@router.post("/v1/load_lora_adapter", response_model=ModelCard, responses=FAILURES, dependencies=ADMINS_ONLY)
async def load_lora_adapter(body: LoadRequest, server: ServerDep) -> dict[str, Any]:
    """Load an adapter from the server's folder of adapters. Needs an admin key and --enable-runtime-lora."""
    await server.names.load(body.lora_name, body.lora_path, bool(body.load_inplace))
    return _card(server, body.lora_name)


@router.post("/v1/unload_lora_adapter", response_model=Unloaded, responses=FAILURES, dependencies=ADMINS_ONLY)
async def unload_lora_adapter(body: UnloadRequest, server: ServerDep) -> dict[str, Any]:
    """Unload an adapter. Needs an admin key and --enable-runtime-lora."""
    await server.names.unload(body.lora_name, bool(body.force))
    return {"id": body.lora_name, "object": "model", "deleted": True}
