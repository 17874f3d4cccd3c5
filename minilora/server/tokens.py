"""POST /tokenize and /detokenize."""

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from ..errors import UsageError
from .answers import FAILURES, Detokenized, Tokenized
from .chat import encode
from .failures import about
from .protocol import DetokenizeRequest, TokenizeRequest
from .state import Server, ServerDep
from .stream import document

router = APIRouter()


@router.post("/tokenize", response_model=Tokenized, responses=FAILURES)
async def tokenize(body: TokenizeRequest, server: ServerDep) -> Response:
    """The tokens of a text or a conversation."""
    await server.names.resolve(body.model)
    return await asyncio.to_thread(_tokenized, body, server)


def _tokenized(body: TokenizeRequest, server: Server) -> Response:
    """The answer, which may be of millions of tokens: all of it is made in a thread, while others are served."""
    engine, tokens = server.engine, _encode(body, server)
    names = [engine.tokenizer.token(token) for token in tokens] if body.return_token_strs else None
    found = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens, "token_strs": names}
    return document(found)


def _encode(body: TokenizeRequest, server: Server) -> list[int]:
    if body.messages is not None:
        with about("messages"):
            return encode(server, body.messages, body)
    text = body.prompt or ""
    server.check_length(len(text), "prompt")
    with about("prompt"):
        return server.engine.tokenizer.encode(text, body.add_special_tokens is not False)


@router.post("/detokenize", response_model=Detokenized, responses=FAILURES)
async def detokenize(body: DetokenizeRequest, server: ServerDep) -> Response:
    """The text of tokens, special ones included."""
    await server.names.resolve(body.model)
    return await asyncio.to_thread(_detokenized, body, server)


def _detokenized(body: DetokenizeRequest, server: Server) -> Response:
    size = server.engine.model.weights.config.vocab_size
    if wrong := [token for token in body.tokens if not 0 <= token < size]:
        raise UsageError(f"tokens holds {str(wrong[0])[:40]}, the vocabulary has {size} tokens", param="tokens")
    return document({"prompt": server.engine.tokenizer.decode(body.tokens, False)})
