"""Whatever is sent to a team's engine, it answers and goes on; whatever a served engine answers, so do we."""

import asyncio
import contextlib
import json
import logging

import httpx2
import pytest
from faulty import GOOD, RESET, STREAM, Faulty, chunk, event, page
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import TOKEN, hosted, team
from test_connections import BODY, HEAD, WHOLE, answer, connected

from midfill.engine.api import Request
from midfill.engine.remote.client.dialects import DIALECTS, InvalidResponseError, StreamParser
from midfill.engine.remote.client.endpoint import RemoteSpec
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.server import guard
from midfill.engine.remote.server.connections import ConnectionLimits
from midfill.engine.scripted import Rule, Script
from midfill.errors import MidfillError
from midfill.fim.templates import infill
from profiles import examples

SHORT = ConnectionLimits(head_s=0.1, body_s=0.1, unread_s=0.1)
SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=12,
)
NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "suffix",
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "best_of",
        "echo",
        "logprobs",
        "stop",
        "stream",
        "stream_options",
        "seed",
        "user",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "stop_token_ids",
        "midfill",
    ]
)
LIKELY = st.sampled_from(
    [0, 1, True, False, None, "a", "", [], {}, ["a"], [97], [[97]], -1, 10**20, 0.5, "\x00"]
)
FIELDS = st.dictionaries(NAMES | st.text(max_size=8), LIKELY | JSON, max_size=8)
# Pieces of requests, whole and broken, in any order.
PARTS = st.sampled_from(
    [
        WHOLE,
        HEAD,
        BODY,
        b"GET /health HTTP/1.1\r\n",
        b"GET /midfill/ready HTTP/1.1\r\n",
        b"GET /v1/models HTTP/1.0\r\n",
        b"POST /midfill/idle HTTP/1.1\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n",
        b"HEAD /metrics HTTP/1.1\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        f"Authorization: Bearer {TOKEN}\r\nHost: localhost\r\n".encode(),
        b"Host: evil.example\r\n",
        b"Origin: null\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 5, 5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: upgrade\r\nUpgrade: websocket\r\n",
        b"Connection: close\r\n",
        b"Authorization: Bearer \xff\xfe\r\n",
        b"X: \x00\r\n",
        b"\r\n",
        b"\r\n\r\n",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"ffffffffffff\r\n",
        b"%ff%00%c3",
    ]
)
RAW = st.lists(PARTS | st.binary(max_size=30), max_size=8).map(b"".join)


@contextlib.contextmanager
def nothing_goes_wrong(caplog):
    """No log of a fault, and no exception that nobody has caught."""
    caplog.clear()
    uncaught = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: uncaught.append(context))
    yield
    assert not uncaught
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(guard, "_BURST", 1e9)
    monkeypatch.setattr(guard, "_REFUSAL_DELAY_S", 0.0)


def with_server(test, caplog, limits=None):
    """Run a coroutine against a server and a client of it."""

    async def run():
        script = Script(rules=[Rule(after="x", crash=True), Rule(text="hello", logprob=-1.0)])
        options = {"infill": lambda model, before, after: infill(model, None, before, after)}
        async with hosted(team(), script=script, limits=limits, **options) as (_, url):
            with nothing_goes_wrong(caplog):
                await test(url)
            assert b" 200 " in await answer(url)

    asyncio.run(run())


@pytest.mark.fuzz
@settings(max_examples=examples(30), suppress_health_check=SLOW)
@given(st.lists(RAW, min_size=1, max_size=8))
def test_raw_bytes(caplog, many):
    async def send(url):
        for data in many:
            reader, writer = await connected(url, data)
            with contextlib.suppress(ConnectionError, OSError):
                writer.write_eof()
            with contextlib.suppress(ConnectionError):
                found = await asyncio.wait_for(reader.read(), 60)
                assert b"HTTP/1.1 5" not in found
                assert b"Traceback" not in found
            writer.close()

    with_server(send, caplog, SHORT)


@pytest.mark.fuzz
@settings(max_examples=examples(30), suppress_health_check=SLOW)
@given(st.lists(RAW, min_size=1, max_size=4))
def test_raw_bytes_of_who_stays(caplog, many):
    """Without an end; the deadlines are short."""

    async def send(url):
        for data in many:
            reader, writer = await connected(url, data + b"GET / HTTP/1.1\r\nHost: x")
            with contextlib.suppress(ConnectionError):
                assert b"HTTP/1.1 5" not in await asyncio.wait_for(reader.read(), 60)
            writer.close()

    with_server(send, caplog, SHORT)


@pytest.mark.fuzz
@settings(max_examples=examples(30), suppress_health_check=SLOW)
@given(st.lists(st.tuples(st.booleans(), FIELDS | JSON | st.binary(max_size=40)), min_size=1, max_size=10))
def test_bodies(caplog, many):
    async def send(url):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            for path in ("/v1/completions", "/midfill/idle"):
                for has_prompt, body in many:
                    whole = {"prompt": "a"} | body if has_prompt and isinstance(body, dict) else body
                    data = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
                    found = await client.post(path, content=data)
                    assert found.status_code in {200, 204, 400, 404}, (data, found.text)
                    if found.status_code in {400, 404}:
                        assert found.json()["error"]["message"]
                        assert len(found.text) < 1000

    with_server(send, caplog)


async def test_an_engine_that_fails_in_its_own_way_quotes_nothing(caplog):
    async with hosted(
        team(), script=Script(rules=[Rule(after="secret", crash=True), Rule(text="hello")])
    ) as (
        _,
        url,
    ):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers) as client:
            for stream in (False, True):
                body = {"prompt": "my secret", "stream": stream}
                found = await client.post("/v1/completions", json=body)
                assert "RuntimeError" in found.text
                assert "secret" not in found.text
                assert found.status_code == (200 if stream else 503)
    assert "a request failed: RuntimeError" in caplog.text
    assert "secret" not in caplog.text
    assert "Traceback" not in caplog.text


# What a served engine may answer.

WORDS = st.sampled_from(
    [
        "choices",
        "text",
        "token_ids",
        "logprobs",
        "token_logprobs",
        "tokens",
        "finish_reason",
        "error",
        "message",
        "usage",
        "prompt_tokens_details",
        "cached_tokens",
        "midfill",
        "computed",
        "reused",
        "content",
        "stop",
        "delta",
        "response",
        "done",
        "completion_probabilities",
        "logprob",
        "timings",
        "cache_n",
        "id",
    ]
)
OBJECTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=10)
    | st.just("token_id:5"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=15,
)
PIECES = st.one_of(
    st.binary(max_size=60),
    OBJECTS.map(event),
    OBJECTS.map(lambda value: chunk(event(value))),
    st.dictionaries(WORDS, OBJECTS, max_size=4).map(lambda value: chunk(event(value))),
    st.sampled_from([*GOOD, STREAM, RESET, 0.001, page("503 x"), page(200, b"[1]"), b"0\r\n\r\n"]),
)


@pytest.mark.fuzz
@settings(max_examples=examples())
@given(st.sampled_from(sorted(DIALECTS)), st.dictionaries(WORDS, OBJECTS, max_size=6))
def test_an_object_of_a_stream_is_a_piece_or_no_answer(kind, value):
    with contextlib.suppress(InvalidResponseError):
        piece = DIALECTS[kind].read(value)
        assert isinstance(piece.text, str)
        assert isinstance(piece.error, str)
        assert all(type(one) is int for one in piece.ids)
        assert all(type(one) in (int, float) for one in piece.logprobs)
        assert type(piece.done) is bool


@pytest.mark.fuzz
@settings(max_examples=examples())
@given(st.lists(st.binary(max_size=30) | OBJECTS.map(event), max_size=10))
def test_bytes_of_a_stream_are_objects_or_no_answer(parts):
    lines = StreamParser(limit=100)
    with contextlib.suppress(InvalidResponseError):
        for part in [*parts, None]:
            assert all(isinstance(one, dict) for one in lines.take(part))


@pytest.mark.fuzz
@settings(max_examples=examples(30), suppress_health_check=SLOW)
@given(
    st.lists(
        st.lists(PIECES, max_size=8).map(lambda parts: [STREAM, *parts]) | st.lists(PIECES, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_an_answer_costs_its_request_and_the_next_is_served(caplog, scripts):
    async def run():
        async with Faulty() as server:
            engine = RemoteEngine(RemoteSpec((server.url,), first_token_s=5.0))
            await engine.start(lambda *_: None)
            with nothing_goes_wrong(caplog):
                for script in scripts:
                    server.script = script
                    tokens = []
                    with contextlib.suppress(MidfillError):
                        tokens = [token async for token in engine.generate(Request((1, 2), 20))]
                    assert all(isinstance(token.text, str) for token in tokens)
            server.script = GOOD
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(MidfillError):
                        if "".join([t.text async for t in engine.generate(Request((1, 2), 20))]) == "a + b":
                            break
                    await asyncio.sleep(0.05)  # the breaker lets the server rest
            await engine.close()

    asyncio.run(run())


@pytest.mark.fuzz
@settings(max_examples=examples(30), suppress_health_check=SLOW)
@given(OBJECTS | st.dictionaries(st.sampled_from(["data", "object", "models"]), OBJECTS, max_size=3))
def test_any_list_of_models_is_used_or_is_a_sentence(caplog, models):
    async def run():
        async with Faulty(models=models) as server:
            engine = RemoteEngine(RemoteSpec((server.url,)))
            with nothing_goes_wrong(caplog), contextlib.suppress(MidfillError):
                await engine.start(lambda *_: None)
            await engine.close()

    asyncio.run(run())
