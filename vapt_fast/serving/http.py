"""What clients see: routes, who may change adapters, how much is read, and reasons as JSON."""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .options import ServeOptions, token_digest
from .refusal import Refusal
from .service import Service
from .store import FILE_NAMES

__all__ = ["make_app"]

RAW_IMAGES = ("image/", "application/octet-stream")
MOST_TOP = 1000

_log = logging.getLogger("vapt_fast")

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(
    service: Callable[[], Service], replica: str, metrics: Callable[[], Awaitable[str]]
) -> Starlette:
    """Return the ASGI application of a replica.

    Args:
        service: gives the replica's service.
        replica: its name, which answers have in the header ``X-Replica``.
        metrics: gives the text of ``GET /metrics``.
    """

    async def predict(request: Request) -> Response:
        image, fields = await _image_and_fields(request, service().options.max_body)
        return JSONResponse(await service().predict(image, _adapter(fields), _top(fields)))

    async def adapters(request: Request) -> Response:
        return JSONResponse({"adapters": service().adapters()})

    async def describe(request: Request) -> Response:
        return JSONResponse(await service().describe(request.path_params["name"]))

    async def put(request: Request) -> Response:
        _authorise(request, service().options)
        name = request.path_params["name"]
        answer, new = await service().put(name, **await _adapter_body(request, service().options.max_body))
        return JSONResponse(answer, 201 if new else 200)

    async def delete(request: Request) -> Response:
        _authorise(request, service().options)
        await service().delete(request.path_params["name"])
        return Response(status_code=204)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "adapters": len(service().adapters())})

    async def show_metrics(request: Request) -> Response:
        return PlainTextResponse(await metrics(), media_type="text/plain; version=0.0.4")

    def route(path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, _answered(endpoint, replica), methods=list(methods))

    app = Starlette(
        routes=[
            route("/predict", predict, "POST"),
            route("/adapters", adapters, "GET"),
            route("/adapters/{name}", describe, "GET"),
            route("/adapters/{name}", put, "PUT", "POST"),
            route("/adapters/{name}", delete, "DELETE"),
            route("/health", health, "GET"),
            route("/metrics", show_metrics, "GET"),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False
    return app


def _answered(endpoint: Endpoint, replica: str) -> Endpoint:
    """The endpoint, whose refusals are answers, and whose faults are logged and told without details."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except Refusal as refusal:
            response = _error(refusal.status, refusal.reason)
        except (HTTPException, ClientDisconnect):
            raise
        except Exception:
            _log.exception("%s %s failed", request.method, request.url.path)
            response = _error(500, "the server failed; its log says why")
        response.headers["X-Replica"] = replica
        return response

    return answer


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _error(error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


def _error(status: int, reason: str) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status)
    return JSONResponse({"error": reason}, status, headers)


# ---- what requests hold


def _authorise(request: Request, options: ServeOptions) -> None:
    """Raise Refusal unless the request shows the server's token; comparing always takes the same time."""
    if options.token_sha256 is None:
        raise Refusal(403, "this server was started without a token, so adapters can't be changed")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token_digest(token), options.token_sha256):
        raise Refusal(401, "changes need the server's token: Authorization: Bearer TOKEN")


async def _body(request: Request, most: int) -> bytes:
    """The body, of which no more is read than ``most`` bytes and what came with the last of them."""
    too_large = Refusal(413, f"the body has more than {most:,} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)


async def _form(request: Request, most: int) -> dict[str, str | bytes]:
    """The fields of a multipart form: text, or the contents of files."""
    body = await _body(request, most)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    fields: dict[str, str | bytes] = {}
    try:
        async with Request(request.scope, receive).form(max_files=4, max_fields=16) as form:
            for name, value in form.multi_items():
                if name in fields:
                    raise Refusal(400, f"the form has several fields {name[:80]!a}")
                fields[name] = value if isinstance(value, str) else await value.read()
    except HTTPException as error:
        raise Refusal(400, f"the form is malformed: {error.detail}") from error
    except (KeyError, ValueError) as error:  # unknown character sets, and bytes that are none of theirs
        raise Refusal(400, "the form is malformed") from error
    return fields


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _image_and_fields(request: Request, most: int) -> tuple[bytes, dict[str, Any]]:
    kind, fields = _content_type(request), dict(request.query_params)
    if kind == "multipart/form-data":
        form = await _form(request, most)
        image = form.pop("image", None)
        if not isinstance(image, bytes):
            raise Refusal(400, "the form has no file `image`")
        return image, fields | form
    if not kind.startswith(RAW_IMAGES):
        raise Refusal(
            415, f"the content type is {kind[:80]!a}; expected image/..., application/octet-stream or a form"
        )
    return await _body(request, most), fields


def _adapter(fields: dict[str, Any]) -> str:
    name = fields.get("adapter")
    if not isinstance(name, str) or not name:
        raise Refusal(400, "the request names no adapter: ?adapter=NAME, or the field `adapter` of the form")
    return name


def _top(fields: dict[str, Any]) -> int:
    value = fields.get("top", "1")
    if not isinstance(value, str) or not (value.isascii() and value.isdecimal() and len(value) < 6):
        raise Refusal(400, f"top must be a number, got {str(value)[:20]!a}")
    if not 1 <= int(value) <= MOST_TOP:
        raise Refusal(400, f"top must be from 1 to {MOST_TOP}, got {value}")
    return int(value)


async def _adapter_body(request: Request, most: int) -> dict[str, Any]:
    """The arguments of Service.put: the two files of a form, or the folder that JSON names."""
    kind = _content_type(request)
    if kind == "multipart/form-data":
        form = await _form(request, most)
        files = {name: value for name, value in form.items() if isinstance(value, bytes)}
        if files.keys() != set(FILE_NAMES) or len(files) != len(form):
            raise Refusal(400, f"expected the files {' and '.join(FILE_NAMES)}, as fields of these names")
        return {"files": files}
    if kind != "application/json":
        raise Refusal(415, f"the content type is {kind[:80]!a}; expected application/json or a form")
    try:
        value = json.loads(await _body(request, most))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not valid JSON") from error
    if not isinstance(value, dict) or value.keys() != {"folder"} or not isinstance(value["folder"], str):
        raise Refusal(400, 'expected {"folder": "NAME"}')
    return value
