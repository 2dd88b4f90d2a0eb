"""Bodies of requests: read within limits, checked, and turned into what an engine answers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from lcr_fast.serving.engine import Engine, RecommendRequest, ScoreRequest, UnknownIdError


class Limits(NamedTuple):
    """What a request may ask for."""

    body_bytes: int = 1 << 16
    body_seconds: float = 5.0  # until the body is there
    items: int = 1000  # of one request for scores
    k: int = 1000


class RequestError(Exception):
    """Why a request has no answer: an HTTP status and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


async def read_body(
    chunks: AsyncIterator[bytes], announced: str | None, limits: Limits
) -> dict[str, Any]:
    """Read a JSON object; ``announced`` is its Content-Length. Raises RequestError."""
    too_large = RequestError(413, f"the body must be at most {limits.body_bytes} bytes")
    if announced is not None and announced.isdigit() and int(announced[:20]) > limits.body_bytes:
        raise too_large

    async def read() -> bytes:
        body = bytearray()
        async for chunk in chunks:
            body += chunk
            if len(body) > limits.body_bytes:
                raise too_large
        return bytes(body)

    try:
        body = await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise RequestError(
            408, f"the body did not arrive within {limits.body_seconds:g} seconds"
        ) from None
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body must be a JSON object") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the body must be a JSON object")
    return value


def score_request(engine: Engine, value: dict[str, Any], limits: Limits) -> ScoreRequest:
    """Check {"user": ID, "items": [ID, ...]}. Raises RequestError."""
    _check_keys(value, ("user", "items"))
    items = value["items"]
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise RequestError(400, "items must be a list of ids, each a text")
    if not 1 <= len(items) <= limits.items:
        raise RequestError(400, f"items must hold 1 to {limits.items} ids, got {len(items)}")
    return ScoreRequest(_user(engine, value), tuple(_item(engine, item) for item in items))


def recommend_request(engine: Engine, value: dict[str, Any], limits: Limits) -> RecommendRequest:
    """Check {"user": ID, "k": NUMBER}, k 10 where it is not there. Raises RequestError."""
    _check_keys({"k": 10, **value}, ("user", "k"))
    k = value.get("k", 10)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= limits.k:
        raise RequestError(400, f"k must be an integer from 1 to {limits.k}")
    return RecommendRequest(_user(engine, value), k)


def _check_keys(value: dict[str, Any], wanted: tuple[str, ...]) -> None:
    for key in wanted:
        if key not in value:
            raise RequestError(400, f"{key} is missing")
    for key in value.keys() - set(wanted):
        raise RequestError(400, f"there is no {_shown(key)}, only {' and '.join(wanted)}")


def _user(engine: Engine, value: dict[str, Any]) -> int:
    if not isinstance(value["user"], str):
        raise RequestError(400, "user must be an id, a text")
    try:
        return engine.user(value["user"])
    except UnknownIdError:
        raise RequestError(404, f"user {_shown(value['user'])} is not in the data") from None


def _item(engine: Engine, text: str) -> int:
    try:
        return engine.item(text)
    except UnknownIdError:
        raise RequestError(400, f"item {_shown(text)} is not known") from None


def _shown(text: str, length: int = 40) -> str:
    """Quote a text that came from outside, shortened."""
    return ascii(text if len(text) <= length else text[:length] + "...")
