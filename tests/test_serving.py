"""The service, asked by real clients over loopback: answers, load, hostile input, its end."""

import asyncio
import contextlib
import json
import math
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from lcr_fast.serving.app import create_app, make_server  # noqa: E402
from lcr_fast.serving.engine import Engine, RecommendRequest, ScoreRequest  # noqa: E402
from lcr_fast.serving.microbatch import ClosedError, MicroBatcher, OverloadedError  # noqa: E402
from lcr_fast.serving.requests import Limits  # noqa: E402

LIMITS = Limits(body_bytes=2048, body_seconds=0.3, items=50, k=20)


@contextlib.contextmanager
def served(app):
    """Serve an application on a free port of the loopback interface; yield its address."""
    lines, listening = [], threading.Event()

    def say(line):
        lines.append(line)
        listening.set()

    server = make_server(app, port=0, say=say)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert listening.wait(10)
    try:
        yield lines[0].removeprefix("listening on ")
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def engine(prepared, make_model):
    return Engine(make_model(prepared).eval(), prepared)


@pytest.fixture(scope="module")
def url(engine):
    with served(create_app(engine, limits=LIMITS)) as url:
        yield url


def ids(engine, user, n):
    return engine.data.users[user], [engine.data.items[i] for i in range(1, n + 1)]


def test_scores_are_the_models(engine, url):
    user, items = ids(engine, 3, 7)
    answer = httpx.post(f"{url}/score", json={"user": user, "items": items})
    assert answer.status_code == 200
    (expected,) = engine.score([ScoreRequest(3, tuple(range(1, 8)))])
    assert answer.json() == {"scores": expected}
    assert len(set(expected)) > 1


def test_recommendations_are_the_models(engine, url):
    user, _ = ids(engine, 5, 1)
    answer = httpx.post(f"{url}/recommend", json={"user": user, "k": 4}).json()
    (expected,) = engine.recommend([RecommendRequest(5, 4)])
    assert [(one["item"], one["score"]) for one in answer["items"]] == expected
    assert len(httpx.post(f"{url}/recommend", json={"user": user}).json()["items"]) == 10


def test_answers_do_not_depend_on_their_batch(engine):
    requests = [ScoreRequest(u, tuple(range(1, 2 + u))) for u in range(1, 9)]
    for request, scores in zip(requests, engine.score(requests), strict=True):
        assert scores == pytest.approx(engine.score([request])[0], rel=1e-5)
    requests = [RecommendRequest(u, u) for u in range(1, 9)]
    for request, found in zip(requests, engine.recommend(requests), strict=True):
        (alone,) = engine.recommend([request])
        assert [item for item, _ in found] == [item for item, _ in alone]


def test_an_engine_takes_rows_of_its_tables_alone(engine):
    assert engine.score([]) == engine.recommend([]) == []
    for request in (ScoreRequest(-5, (1,)), ScoreRequest(10**6, (1,)), ScoreRequest(1.5, (1,))):
        with pytest.raises(ValueError, match=r"the user of a request must be an integer 1\.\."):
            engine.score([request])
    for items in ((0,), (-1,), (1.7,), (10**6,)):
        with pytest.raises(ValueError, match=r"the item of a request must be an integer 1\.\."):
            engine.score([ScoreRequest(1, items)])
    with pytest.raises(ValueError, match="the user of a request"):
        engine.recommend([RecommendRequest(0, 3)])


def test_many_clients_at_once_all_get_their_own_answers(engine):
    n_clients, n_requests = 8, 12
    app = create_app(engine, limits=LIMITS, max_batch=4, max_wait=0.002)
    expected = {u: engine.score([ScoreRequest(u, (1, 2, 3))])[0] for u in range(1, 20)}

    def client(number, url):
        with httpx.Client(base_url=url) as session:
            for i in range(n_requests):
                user = 1 + (number * n_requests + i) % 19
                name, items = ids(engine, user, 3)
                answer = session.post("/score", json={"user": name, "items": items})
                assert answer.json()["scores"] == pytest.approx(expected[user], rel=1e-5)
        return n_requests

    with served(app) as url:
        with ThreadPoolExecutor(n_clients) as pool:
            done = sum(pool.map(client, range(n_clients), [url] * n_clients))
        text = httpx.get(f"{url}/metrics").text
    assert done == n_clients * n_requests
    assert f'lcr_fast_requests_total{{path="/score",status="200"}} {done}' in text
    assert f'lcr_fast_batch_size_sum{{path="/score"}} {done}' in text
    (n_batches,) = re.findall(r'lcr_fast_batch_size_count\{path="/score"\} (\d+)', text)
    assert done / 4 <= int(n_batches) < done  # some were computed together
    assert f'lcr_fast_batch_size_bucket{{path="/score",le="4"}} {n_batches}' in text
    assert f'lcr_fast_request_seconds_bucket{{path="/score",le="+Inf"}} {done}' in text


def test_health(engine, url):
    health = httpx.get(f"{url}/health").json()
    assert health["status"] == "ok"
    assert health["users"] == engine.data.n_users


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("score", b"", 400, "the body must be a JSON object"),
        ("score", b"[1, 2]", 400, "the body must be a JSON object"),
        ("score", b"\xff\xfe{}", 400, "the body must be a JSON object"),
        ("score", b'{"user": "u", "items": [' + b"9" * 1900 + b"}", 400, "must be a JSON object"),
        ("score", b"[" * 2000, 400, "the body must be a JSON object"),
        ("score", b'{"a":' * 400, 400, "the body must be a JSON object"),
        ("score", b"{}", 400, "user is missing"),
        ("score", {"user": "$user"}, 400, "items is missing"),
        ("score", {"user": "$user", "items": [], "k": 1}, 400, "there is no 'k', only user and"),
        ("score", {"user": 3, "items": ["$item"]}, 400, "user must be an id, a text"),
        ("score", {"user": "$user", "items": "$item"}, 400, "items must be a list of ids"),
        ("score", {"user": "$user", "items": ["$item", 1]}, 400, "items must be a list of ids"),
        ("score", {"user": "$user", "items": []}, 400, "items must hold 1 to 50 ids, got 0"),
        ("score", {"user": "$user", "items": ["$item"] * 51}, 400, "1 to 50 ids, got 51"),
        ("score", {"user": "$user", "items": ["none\ud800"]}, 400, "item 'none\\ud800' is not"),
        ("score", {"user": "nobody" * 9, "items": ["$item"]}, 404, "user 'nobodynobody"),
        ("recommend", {"user": "nobody"}, 404, "user 'nobody' is not in the data"),
        ("recommend", {"user": "$user", "k": 0}, 400, "k must be an integer from 1 to 20"),
        ("recommend", {"user": "$user", "k": 21}, 400, "k must be an integer from 1 to 20"),
        ("recommend", {"user": "$user", "k": True}, 400, "k must be an integer"),
        ("recommend", {"user": "$user", "k": 1e999}, 400, "k must be an integer"),
        ("recommend", {"user": "$user", "k": "5"}, 400, "k must be an integer"),
        ("score", b" " * 2049, 413, "the body must be at most 2048 bytes"),
        ("nothing", b"", 404, "Not Found"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests_get_a_sentence(engine, url, path, body, status, sentence):
    user, (item,) = ids(engine, 1, 1)
    if isinstance(body, dict):
        text = json.dumps(body).replace("$user", user).replace("$item", item)
        body = text.encode()
    answer = httpx.post(f"{url}/{path}", content=body)
    assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text


def test_other_methods(url):
    assert httpx.get(f"{url}/score").status_code == 405
    assert httpx.post(f"{url}/health").status_code == 405
    assert httpx.post(f"{url}/score/", json={}).status_code == 404  # no way to somewhere else


def test_a_body_without_end_is_cut_off(url):
    def chunks():
        for _ in range(64):
            yield b" " * 512

    with contextlib.suppress(httpx.WriteError):  # the service has heard enough
        assert httpx.post(f"{url}/score", content=chunks()).status_code == 413
    assert httpx.get(f"{url}/health").status_code == 200


def raw(url, *parts, wait=0.0):
    """Send parts of a request, with waits between them; return all that comes back."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(wait)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def test_a_slow_body_is_given_up(url):
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head + b"{")
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "bytes_",
    [
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",  # then it hangs up
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_not_http_does_no_harm(url, bytes_):
    with contextlib.suppress(ConnectionError):
        assert b" 200 " not in raw(url, bytes_)
    assert httpx.get(f"{url}/health").status_code == 200


class SlowEngine:
    """An engine that takes its time."""

    def __init__(self, engine, seconds):
        self.engine, self.seconds = engine, seconds
        self.started = threading.Event()

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def score(self, requests):
        self.started.set()
        time.sleep(self.seconds)
        return self.engine.score(requests)


def test_what_was_taken_is_answered_before_the_end(engine):
    slow = SlowEngine(engine, 0.3)
    user, items = ids(engine, 1, 2)
    with ThreadPoolExecutor(1) as pool:
        with served(create_app(slow)) as url:
            answer = pool.submit(httpx.post, f"{url}/score", json={"user": user, "items": items})
            assert slow.started.wait(5)
        assert answer.result().status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_what_would_take_too_long_is_turned_away_in_the_end(engine, monkeypatch):
    monkeypatch.setattr("lcr_fast.serving.app._GRACE", 1)
    slow = SlowEngine(engine, 2)
    user, items = ids(engine, 1, 2)
    with ThreadPoolExecutor(3) as pool:
        with served(create_app(slow, max_batch=1)) as url:

            def ask(_):
                return httpx.post(f"{url}/score", json={"user": user, "items": items}, timeout=30)

            answers = [pool.submit(ask, i) for i in range(3)]
            while "lcr_fast_waiting 2" not in httpx.get(f"{url}/metrics").text:
                assert not any(answer.done() for answer in answers), "the machine is too slow"
        answers = [answer.result() for answer in answers]
    turned_away = [answer for answer in answers if answer.status_code != 200]
    assert turned_away
    for answer in turned_away:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json() == {"error": "the service stops"}


@pytest.mark.parametrize("port", [-1, 2**16])
def test_a_port_is_one(engine, port):
    with pytest.raises(ValueError, match=f"port must be within 0..65535, got {port}"):
        make_server(create_app(engine), port=port, say=print)


def test_a_full_queue_says_so(engine):
    slow = SlowEngine(engine, 0.3)
    user, items = ids(engine, 1, 2)
    with ThreadPoolExecutor(4) as pool, served(create_app(slow, max_batch=1, max_queue=1)) as url:

        def ask(_):
            return httpx.post(f"{url}/score", json={"user": user, "items": items})

        first = pool.submit(ask, 0)
        assert slow.started.wait(5)
        answers = [first.result(), *pool.map(ask, range(4))]
    codes = [answer.status_code for answer in answers]
    assert codes[0] == 200
    assert 503 in codes
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 503} == {
        "1"
    }


def test_scores_in_bfloat16(prepared, make_model):
    model = make_model(prepared, item_text_dim=0, query_text_dim=0).eval()
    whole, half = (Engine(model, prepared, dtype=d) for d in (torch.float32, torch.bfloat16))
    request = ScoreRequest(1, tuple(range(1, prepared.n_items + 1)))
    exact, rounded = (torch.tensor(e.score([request])[0]) for e in (whole, half))
    assert "products in float32" in whole.describe_scores()
    assert "products in bfloat16" in half.describe_scores()
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.02, atol=0.02 * exact.abs().max().item())


def test_what_serves_no_bfloat16_is_refused(prepared, make_model):
    model = make_model(prepared, backend="reference").eval()
    assert Engine(model, prepared).describe_scores() == "op by op in float32"
    with pytest.raises(ValueError, match="one call cannot serve this model: its backend is ref"):
        Engine(model, prepared, dtype=torch.bfloat16).describe_scores()


def test_what_cannot_be_computed_is_an_error_and_not_the_end(prepared, make_model, caplog):
    model = make_model(prepared).eval()
    with torch.no_grad():
        model.head.target_weight.fill_(torch.nan)
    user, items = ids(Engine(model, prepared), 1, 2)
    with served(create_app(Engine(model, prepared))) as url:
        answer = httpx.post(f"{url}/score", json={"user": user, "items": items})
        assert answer.status_code == 500
        assert "NaN" not in answer.text  # that is for the log
        assert httpx.get(f"{url}/health").status_code == 200
    assert "the model's scores hold NaN" in caplog.text


# -- the batches themselves ----------------------------------------------------------------------


def test_batches_are_as_large_as_allowed_and_in_order():
    sizes = []

    async def scenario():
        async with MicroBatcher(
            lambda xs: [x * x for x in xs], max_batch=3, max_wait=0.05, observe=sizes.append
        ) as batcher:
            return await asyncio.gather(*(batcher.submit(x) for x in range(7)))

    assert asyncio.run(scenario()) == [x * x for x in range(7)]
    assert sizes == [3, 3, 1]


def test_a_wait_collects_what_comes_within_it():
    sizes = []

    async def scenario():
        async with MicroBatcher(list, max_wait=0.5, observe=sizes.append) as batcher:
            first = asyncio.create_task(batcher.submit(1))
            await asyncio.sleep(0.05)
            assert await asyncio.gather(first, batcher.submit(2)) == [1, 2]

    asyncio.run(scenario())
    assert sizes == [2]


def test_an_error_is_every_ones_of_its_batch_and_the_next_works():
    def run(xs):
        if "bad" in xs:
            raise ValueError("bad")
        return xs

    async def scenario():
        async with MicroBatcher(run, max_wait=0.02) as batcher:
            asked = [batcher.submit(x) for x in ("good", "bad")]
            errors = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(error, ValueError) for error in errors)
            assert await batcher.submit("good") == "good"
        with pytest.raises(ClosedError):
            await batcher.submit("late")

    asyncio.run(scenario())


def test_a_result_for_each_request():
    async def scenario():
        async with MicroBatcher(lambda xs: xs[:1], max_wait=0.02) as batcher:
            asked = [batcher.submit(x) for x in (1, 2)]
            errors = await asyncio.gather(*asked, return_exceptions=True)
            assert [str(error) for error in errors] == ["1 results for 2 requests"] * 2
            assert await batcher.submit(3) == 3

    asyncio.run(asyncio.wait_for(scenario(), 5))  # who is forgotten waits for ever


def test_both_kinds_of_requests_share_one_thread(prepared, make_model, monkeypatch):
    engine, threads = Engine(make_model(prepared).eval(), prepared), []
    running = threading.Semaphore(1)

    def one_at_a_time(requests):
        assert running.acquire(blocking=False)
        threads.append(threading.get_ident())
        time.sleep(0.05)
        running.release()
        return [[] for _ in requests]

    monkeypatch.setattr(engine, "score", one_at_a_time)
    monkeypatch.setattr(engine, "recommend", one_at_a_time)
    user, items = ids(engine, 1, 1)
    asked = [("/score", {"user": user, "items": items}), ("/recommend", {"user": user})]
    with served(create_app(engine, limits=LIMITS)) as url, ThreadPoolExecutor(2) as pool:
        posts = [pool.submit(httpx.post, url + path, json=body) for path, body in asked * 3]
        assert {post.result().status_code for post in posts} == {200}
    assert len(set(threads)) == 1


def test_who_has_gone_away_is_not_computed():
    ran = []

    async def scenario():
        async with MicroBatcher(lambda xs: ran.extend(xs) or xs, max_wait=0.05) as batcher:
            gone = asyncio.create_task(batcher.submit("gone"))
            stays = asyncio.create_task(batcher.submit("stays"))
            await asyncio.sleep(0.01)
            gone.cancel()
            assert await stays == "stays"

    asyncio.run(scenario())
    assert ran == ["stays"]


def test_a_queue_has_an_end():
    async def scenario():
        async with MicroBatcher(list, max_wait=0.05, max_queue=2) as batcher:
            waiting = [asyncio.create_task(batcher.submit(x)) for x in range(2)]
            await asyncio.sleep(0)
            assert batcher.n_waiting == 2
            with pytest.raises(OverloadedError):
                await batcher.submit(3)
            assert await asyncio.gather(*waiting) == [0, 1]

    asyncio.run(scenario())
    with pytest.raises(ValueError, match="at least 1"):
        MicroBatcher(list, max_batch=0)


@pytest.mark.parametrize("wait", [-0.1, math.nan, math.inf])
def test_a_wait_is_a_time(wait):
    with pytest.raises(ValueError, match="max_wait at least 0 and finite, got 64, 1024 and"):
        MicroBatcher(list, max_wait=wait)
