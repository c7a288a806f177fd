"""Served engines: what their servers do wrong costs one request, in time, and shows nothing half."""

import asyncio
import contextlib
import gzip
import itertools
import logging
import time
from contextlib import aclosing

import pytest
from clock import in_its_own_time
from faulty import GOOD, RESET, SILENCE, STREAM, WORDS, Faulty, chunk, event, page, word

from midfill.completer import Completer, Trigger
from midfill.documents import Document, Point, Snapshot
from midfill.engine import Request
from midfill.engine.served import recognition
from midfill.engine.served.endpoint import RemoteSpec
from midfill.engine.served.remote import RemoteEngine
from midfill.errors import EngineError, EngineUnavailableError
from midfill.families import FAMILIES
from midfill.reasons import Reason
from midfill.settings import Settings

FAMILY = ("qwen2.5-coder", FAMILIES["qwen2.5-coder"])
DEADLINE_S = 0.8
TEXT = "def add(a, b):\n    return \n"
HERE = Snapshot(Document.open("file:///work/a.py", "python", 1, TEXT), Point(1, 11))
ANSWER = "".join(WORDS)


async def started(*servers, **spec):
    engine = RemoteEngine(
        RemoteSpec(tuple(server.url for server in servers), first_token_s=DEADLINE_S / 2, **spec)
    )
    await engine.start(lambda _message, _share: None)
    return engine


async def complete(engine):
    completer = Completer(Settings(deadline_s=DEADLINE_S, eagerness="always"))
    completer.use(engine, FAMILY)
    return await completer.complete(HERE, Trigger.INVOKED)


async def answered(engine):
    """Ask as a typist does until there is an answer: the breaker lets the server rest for a moment."""
    async with asyncio.timeout(60):
        for _ in itertools.count():
            if (again := await complete(engine)).text == ANSWER:
                return
            assert again.reason in {UNAVAILABLE, ERROR}
            await asyncio.sleep(0.05)


def endless(data):
    return lambda: itertools.repeat(data)


def one_byte_at_a_time():
    return [bytes([byte]) for byte in b"".join(GOOD)]


UNAVAILABLE, ERROR, DEADLINE = Reason.ENGINE_UNAVAILABLE, Reason.ENGINE_ERROR, Reason.DEADLINE
PART = [STREAM, chunk(word("a")), chunk(word(" +"))]
HTML = b"<html><body>Sign in to the network</body></html>"

# What the server does: (script, reason of the empty answer, a part of the sentence). None: it is no fault.
FAULTS = {
    "an answer": (GOOD, None, ""),
    "an answer byte by byte": (one_byte_at_a_time(), None, ""),
    "an answer in one piece": ([b"".join(GOOD)], None, ""),
    "an answer with pauses": ([x for part in GOOD for x in (part, 0.02)], None, ""),
    "no mark at the end, but a reason": ([*GOOD[:5], b"0\r\n\r\n"], None, ""),
    "hangs up at once": ([], UNAVAILABLE, "hung up"),
    "resets at once": ([RESET], UNAVAILABLE, "hung up"),
    "hangs up behind the head": ([STREAM], UNAVAILABLE, "hung up"),
    "hangs up in the middle": (PART, UNAVAILABLE, "hung up"),
    "resets in the middle": ([*PART, RESET], UNAVAILABLE, "hung up"),
    "ends without an end": ([*PART, b"0\r\n\r\n"], UNAVAILABLE, "hung up"),
    "half a chunk": ([*PART, b"40\r\ndata: {"], UNAVAILABLE, "hung up"),
    "a chunk of no size": ([*PART, b"zz\r\n"], UNAVAILABLE, "HTTP"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n"], UNAVAILABLE, "HTTP"),
    "an endless head": ([b"HTTP/1.1 200 OK\r\nX: ", endless(b"x" * 1000)], UNAVAILABLE, "HTTP"),
    "a page of a hotel": ([page(200, HTML, "text/html")], UNAVAILABLE, "text/html"),
    "no content type": ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"], UNAVAILABLE, "no content type"),
    "no JSON": ([*PART, chunk(b"data: {oh\n")], UNAVAILABLE, "makes no sense"),
    "no text": ([*PART, chunk(b"data: \xff\xfe\xfd\n")], UNAVAILABLE, "makes no sense"),
    "a list": ([*PART, chunk(event([1]))], UNAVAILABLE, "makes no sense"),
    "deep brackets": ([*PART, chunk(event(b"[" * 100_000))], UNAVAILABLE, "makes no sense"),
    "a number for a text": ([*PART, chunk(event({"choices": [{"text": 5}]}))], UNAVAILABLE, "makes no sense"),
    "an object for a list": ([*PART, chunk(event({"choices": {}}))], UNAVAILABLE, "makes no sense"),
    "text for a probability": ([*PART, chunk(word("b", "x"))], UNAVAILABLE, "makes no sense"),
    "an error in the middle": ([*PART, chunk(event({"error": {"message": TEXT}}))], UNAVAILABLE, "error"),
    "wrongly packed": (
        [
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\n\r\n",
            gzip.compress(b"x" * 50)[:15] + b"garbage" * 9,
        ],
        UNAVAILABLE,
        "makes no sense",
    ),
    "400": ([page("400 Bad Request")], ERROR, "400"),
    "401": ([page("401 Unauthorized")], UNAVAILABLE, "engine_key"),
    "403": ([page("403 Forbidden")], UNAVAILABLE, "engine_key"),
    "404": ([page("404 Not Found")], UNAVAILABLE, "404"),
    "429": ([page("429 Too Many Requests", Retry_After=1)], ERROR, "429"),
    "500": ([page("500 Internal Server Error")], UNAVAILABLE, "500"),
    "502 of a proxy": ([page("502 Bad Gateway", HTML, "text/html")], UNAVAILABLE, "502"),
    "503": ([page("503 Service Unavailable")], ERROR, "503"),
    "a redirect": ([page("307 Temporary Redirect", Location="http://127.0.0.1:9/")], UNAVAILABLE, "redirect"),
    "silence": ([SILENCE], UNAVAILABLE, "no first token"),
    "silence behind the head": ([STREAM, SILENCE], UNAVAILABLE, "no first token"),
    "silence in the middle": ([*PART, SILENCE], DEADLINE, ""),
    "comments without an end": ([STREAM, endless(chunk(b": ping\n\n"))], ERROR, "busy: no first token"),
    "comments in the middle": ([*PART, endless(chunk(b": ping\n\n"))], DEADLINE, ""),
    "empty texts without an end": ([STREAM, endless(chunk(word("")))], UNAVAILABLE, "no first token"),
    "a line without an end": ([STREAM, endless(chunk(b"x" * 50_000))], UNAVAILABLE, "makes no sense"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_fault_costs_its_request_and_the_next_is_served(fault, caplog):
    script, reason, part = FAULTS[fault]
    caplog.set_level(logging.DEBUG)
    async with Faulty() as server:
        engine = await started(server)
        server.script = script
        answer = await complete(engine)
        if reason is None:
            assert (answer.text, answer.reason) == (ANSWER, None)
        else:
            assert (answer.text, answer.reason) == ("", reason), answer.detail
            assert part in answer.detail
            assert "def add" not in answer.detail
        server.script = GOOD
        await answered(engine)
        await engine.close()
    assert "def add" not in "".join(
        record.getMessage() for record in caplog.records if "midfill" in record.name
    )


@in_its_own_time
async def test_a_server_that_falls_silent_behind_comments_has_died():
    comments = [part for _ in range(4) for part in (2.0, chunk(b": ping\n\n"))]
    async with Faulty(script=[STREAM, chunk(word("a")), *comments, SILENCE]) as server:
        engine = RemoteEngine(RemoteSpec((server.url,), first_token_s=20.0))
        await engine.start(lambda _message, _share: None)
        begun = time.monotonic()
        with pytest.raises(EngineUnavailableError, match="no further token for 5 s"):
            async for _ in engine.generate(Request((1,), 20)):
                pass
        assert time.monotonic() - begun == pytest.approx(13.0, abs=0.1)
        assert engine.endpoints[0].breaker.failures == 1
        await engine.close()


async def test_an_answer_without_an_end_is_left_at_its_limit():
    async with Faulty(script=[STREAM, endless(chunk(word("x")))]) as server:
        engine = await started(server)
        request = Request((1, 2, 3), 20)
        tokens = [token async for token in engine.generate(request)]
        assert len(tokens) == 20
        await asyncio.wait_for(server.hung_up.wait(), 60)
        await engine.close()


async def test_leaving_the_stream_hangs_up():
    async with Faulty(script=[STREAM, chunk(word("a")), SILENCE]) as server:
        engine = await started(server)
        async with aclosing(engine.generate(Request((1,), 20))) as tokens:
            await anext(tokens)
        await asyncio.wait_for(server.hung_up.wait(), 60)
        server.was_asked.clear()
        server.hung_up.clear()
        task = asyncio.create_task(complete(engine))
        await server.was_asked.wait()
        task.cancel()
        await asyncio.wait_for(server.hung_up.wait(), 60)
        await engine.close()


async def test_a_server_that_is_down_is_told_at_once_in_the_same_words():
    async with Faulty() as server:
        engine = await started(server)
    sentences, failures = set(), []
    breaker = engine.endpoints[0].breaker
    for _ in range(20):
        with pytest.raises(EngineUnavailableError) as error:
            async for _ in engine.generate(Request((1,), 5)):
                pass
        sentences.add(str(error.value))
        # The first tries it twice; once the breaker is open nothing is tried for a while, longer each time.
        failures.append(breaker.failures)
    assert failures[:2] == [2, 3]
    assert failures[-1] < 10
    assert sentences == {f"127.0.0.1:{server.port} cannot be reached."}
    async with server:
        await answered(engine)
    await engine.close()


async def test_another_model_behind_the_same_url_is_not_used():
    async with Faulty() as server:
        engine = await started(server)
        server.script = []
        assert (await complete(engine)).reason is UNAVAILABLE
        server.models = {"data": [{"id": "codellama-7b"}]}
        server.script = GOOD
        answer = await complete(engine)
        assert answer.text == ""
        assert "codellama-7b" in answer.detail
        await engine.close()


async def test_a_request_moves_to_another_server_only_while_nothing_has_come():
    async with Faulty() as one, Faulty() as two:
        engine = await started(one, two)
        one.script = two.script = [page("503 Service Unavailable")]
        assert (await complete(engine)).reason is ERROR
        assert (len(one.completions), len(two.completions)) == (1, 1)
        await engine.close()
        engine = await started(one, two)
        one.script = two.script = PART
        assert (await complete(engine)).reason is UNAVAILABLE
        assert len(one.completions) + len(two.completions) == 3
        await engine.close()


async def test_the_quicker_server_is_asked_and_one_that_dies_is_replaced():
    slow = [STREAM, 0.25, *GOOD[1:]]
    async with Faulty(script=slow) as one, Faulty(script=[STREAM, 0.001, *GOOD[1:]]) as two:
        engine = await started(one, two)
        for _ in range(6):
            assert (await complete(engine)).text == ANSWER
        assert len(two.completions) > len(one.completions)
        await two.__aexit__()
        assert (await complete(engine)).text == ANSWER
        await engine.close()


async def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(monkeypatch):
    async with Faulty() as proxy, Faulty() as here:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        engine = RemoteEngine(RemoteSpec(("http://gpu-box.example:8000",)))
        await engine.start(lambda _message, _share: None)
        assert (await complete(engine)).text == ANSWER
        assert {headers["host"] for _, headers, _ in proxy.asked} == {"gpu-box.example:8000"}
        await engine.close()
        proxy.asked.clear()
        engine = await started(here)
        assert (await complete(engine)).text == ANSWER
        assert proxy.asked == []
        await engine.close()


async def test_a_server_that_says_nothing_when_it_is_reached_is_told(monkeypatch):
    monkeypatch.setattr(recognition, "_ANSWER_S", 0.2)

    async def silent(reader, writer):
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        ended.set()

    ended = asyncio.Event()
    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(EngineUnavailableError, match=f"127.0.0.1:{port} does not answer"):
        await RemoteEngine(RemoteSpec((f"http://127.0.0.1:{port}",))).start(lambda *_: None)
    await ended.wait()
    server.close()


async def test_servers_with_different_models_are_refused():
    async with Faulty() as one, Faulty(models={"data": [{"id": "codellama-7b"}]}) as two:
        with pytest.raises(EngineError, match="must have the same model"):
            await started(one, two)


async def test_a_server_that_comes_later_is_used():
    async with Faulty() as one:
        late = Faulty()
        async with late:
            pass
        engine = await started(one, late)
        one.script = [page("503 Service Unavailable")]
        async with late:
            await answered(engine)
        await engine.close()
