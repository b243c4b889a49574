"""Errors that a client sees: OpenAI's shape, {"error": {message, type, param, code}}, with the right status."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class ApiError(Exception):
    """A request that is not answered: the status, what is wrong, and the field that is to blame."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        """The body, as plain values."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param, code)


def failed(message: str) -> ApiError:
    """A 500: this request has failed, others may not."""
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, message, code="request_failed")


def unavailable(message: str) -> ApiError:
    """A 503: asking again later may help."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, headers={"Retry-After": "5"})


def handle_errors(app: FastAPI) -> None:
    """Gives every error of an application OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(error).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(HTTPStatus(error.status_code), message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        # The server's log has the rest.
        return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed to answer this request").response()


def _invalid(error: RequestValidationError) -> ApiError:
    """The first fault of a body: which field, and what is wrong with it."""
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {fault['ctx']['error']} (character {fault['loc'][-1]})")
    # The place also names members of unions, which are no fields.
    path = [str(part) for part in fault["loc"][1:] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    if not path:
        return bad_request("the body must be a JSON object, sent with Content-Type: application/json")
    param = path[0] + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path[1:])
    if fault["type"] == "extra_forbidden":
        return bad_request(f"{param}: is not supported; leave it out", param)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return bad_request(f"{param}: {message[:1].lower()}{message[1:]}", param)
