"""The service: JSON over HTTP, on Starlette and uvicorn (``pip install "lcr-fast[serve]"``).

    POST /score      {"user": ID, "items": [ID, ...]}  ->  {"scores": [NUMBER, ...]}
    POST /recommend  {"user": ID, "k": NUMBER}         ->  {"items": [{"item": ID, "score": ..}]}
    GET  /health     {"status": "ok", ...}
    GET  /metrics    Prometheus text

Ids are those of the raw data. What is wrong with a request is a sentence, {"error": ...}: 400 for
its content, 404 for an unknown user, 408 for a slow body, 413 for a large one; 503 says that the
queue is full or the service is about to stop. Nobody is asked who they are: it listens on the
loopback interface unless told otherwise, and belongs behind a proxy that does.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from lcr_fast import __version__
from lcr_fast.serving.engine import Engine
from lcr_fast.serving.metrics import SECONDS, SIZES, Counter, Gauge, Histogram, exposition
from lcr_fast.serving.microbatch import ClosedError, MicroBatcher, OverloadedError, one_thread
from lcr_fast.serving.requests import (
    Limits,
    RequestError,
    read_body,
    recommend_request,
    score_request,
)

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise ValueError(
        f"the service needs the package {error.name}: pip install 'lcr-fast[serve]'"
    ) from None

_LOG = logging.getLogger("lcr_fast")
_GRACE = 30  # seconds that a stopping service computes what it took; the rest is turned away


class _Service:
    """The endpoints over one engine, with a queue for each kind of request."""

    def __init__(
        self, engine: Engine, limits: Limits, max_batch: int, max_wait: float, max_queue: int
    ) -> None:
        self.engine, self.limits = engine, limits
        self._requests = Counter("lcr_fast_requests_total", "Answers by path and status.")
        self._seconds = Histogram(
            "lcr_fast_request_seconds", "Time from a request's head to its answer.", SECONDS
        )
        self._sizes = Histogram("lcr_fast_batch_size", "Requests computed together.", SIZES)
        self._thread = one_thread()
        options: dict[str, Any] = {
            "executor": self._thread,
            "max_batch": max_batch,
            "max_wait": max_wait,
            "max_queue": max_queue,
        }
        self._scoring, self._recommending = (
            MicroBatcher(run, observe=self._observer(path), **options)
            for path, run in (("/score", engine.score), ("/recommend", engine.recommend))
        )
        waiting = Gauge(
            "lcr_fast_waiting",
            "Requests in the queues.",
            lambda: self._scoring.n_waiting + self._recommending.n_waiting,
        )
        self._metrics = (self._requests, self._seconds, self._sizes, waiting)

    def _observer(self, path: str) -> Callable[[int], None]:
        return lambda size: self._sizes.observe(size, path=path)

    def app(self) -> Starlette:
        app = Starlette(
            routes=[
                Route("/score", self._timed(self._score), methods=["POST"]),
                Route("/recommend", self._timed(self._recommend), methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._expose),
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_problem},
        )
        app.router.redirect_slashes = False
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with self._thread:
            async with self._scoring, self._recommending:
                yield

    def _timed(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Turn what goes wrong into an answer, and count the answers."""

        async def handle(request: Request) -> Response:
            start, path = time.perf_counter(), request.url.path
            try:
                response = await answer(request)
            except RequestError as problem:
                response = _error(problem.status, problem.sentence)
            except (OverloadedError, ClosedError):
                response = _error(503, "too many requests at once", {"Retry-After": "1"})
            except ClientDisconnect:
                response = Response(status_code=400)  # nobody reads it
            except asyncio.CancelledError:  # the server does so when the time to stop is over
                response = _error(503, "the service stops", {"Retry-After": "1"})
            except Exception:
                _LOG.exception("%s failed", path)
                response = _error(500, "the request could not be computed; the log says why")
            self._requests.add(path=path, status=str(response.status_code))
            self._seconds.observe(time.perf_counter() - start, path=path)
            return response

        return handle

    async def _value(self, request: Request) -> dict[str, Any]:
        announced = request.headers.get("content-length")
        return await read_body(request.stream(), announced, self.limits)

    async def _score(self, request: Request) -> Response:
        wanted = score_request(self.engine, await self._value(request), self.limits)
        return JSONResponse({"scores": await self._scoring.submit(wanted)})

    async def _recommend(self, request: Request) -> Response:
        wanted = recommend_request(self.engine, await self._value(request), self.limits)
        found = await self._recommending.submit(wanted)
        return JSONResponse({"items": [{"item": item, "score": score} for item, score in found]})

    async def _health(self, request: Request) -> Response:
        config = self.engine.model.config
        return JSONResponse({
            "status": "ok", "version": __version__, "items": config.n_items, "steps": config.steps,
            "users": self.engine.data.n_users,
        })  # fmt: skip

    async def _expose(self, request: Request) -> Response:
        return PlainTextResponse(
            exposition(self._metrics), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _error(status: int, sentence: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


async def _http_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


def create_app(
    engine: Engine,
    *,
    limits: Limits = Limits(),  # noqa: B008  # it cannot change
    max_batch: int = 64,
    max_wait: float = 0.0,
    max_queue: int = 1024,
) -> Starlette:
    """Make the ASGI application, for any server; arguments as for MicroBatcher."""
    return _Service(engine, limits, max_batch, max_wait, max_queue).app()


class _Server(uvicorn.Server):
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, say: Callable[[str], None]) -> None:
        super().__init__(config)
        self._say = say

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                host, port = socket.getsockname()[:2]
                self._say(f"listening on http://{host}:{port}")


def make_server(
    app: Starlette, *, host: str = "127.0.0.1", port: int = 8000, say: Callable[[str], None]
) -> uvicorn.Server:
    """Make a server for the application: ``run()`` serves until SIGINT or SIGTERM.

    Then it takes no more connections, answers what it took and returns: with 503 what it has not
    computed within half a minute. ``say`` is told where it listens. Raises ValueError for a port
    that is none.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be within 0..{2**16 - 1}, got {port}")
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        lifespan="on", http="h11", ws="none", loop="asyncio", limit_concurrency=4096,
        timeout_keep_alive=5, timeout_graceful_shutdown=_GRACE,
    )  # fmt: skip
    return _Server(config, say)
