"""The application: the API's routes, with what guards them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from fourfold import __version__
from fourfold.server.errors import bad_request, handle_errors, unavailable
from fourfold.server.generate import chat, completions
from fourfold.server.guard import Guard, Limits
from fourfold.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from fourfold.server.service import Service


def create_app(
    service: Service,
    limits: Limits,
    api_key: str | None,
    on_ready: Callable[[], None],
    on_failure: Callable[[], None],
) -> FastAPI:
    """The application. Its start begins to load the engine.

    Args:
        service: what is served.
        limits: what a request may take.
        api_key: what clients must send as a bearer token; None lets all in.
        on_ready: called when the engine is there.
        on_failure: called once if loading the engine, or a step of it later, fails.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start(on_ready, on_failure)
        yield
        await service.engine.stop()

    app = FastAPI(title="fourfold", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, limits=limits, api_key=api_key)
    handle_errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.stopping():
            raise unavailable("the server is stopping")
        assert service.engine.engine is not None  # raises while there is none
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.engine.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.card()

    @app.post("/v1/completions", response_model=None)
    async def post_completions(body: CompletionBody, request: Request) -> Response:
        return await completions(service, body, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def post_chat(body: ChatBody, request: Request) -> Response:
        return await chat(service, body, request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("prompt: give either prompt or messages", "prompt")
        if body.messages is None:
            tokens = await service.engine.text.encode(str(body.prompt), body.add_special_tokens)
        else:
            messages = [message.plain() for message in body.messages]
            tokens = await service.engine.text.encode_chat(messages, body.add_generation_prompt)
        return {"count": len(tokens), "max_model_len": service.engine.engine.max_model_len, "tokens": tokens}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        service.check_model(body.model)
        size = service.engine.engine.target.config.vocab_size
        if max(body.tokens) >= size:
            raise bad_request(f"tokens: {max(body.tokens)} is outside 0 … {size - 1}", "tokens")
        return {"prompt": await service.engine.text.decode(body.tokens)}

    return app
