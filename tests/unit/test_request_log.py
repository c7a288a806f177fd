"""What requests cost: every piece of the engine's work is noted, however it ends."""

import asyncio
from contextlib import aclosing

import pytest

from midfill.completion.stats.request_log import REQUEST, InstrumentedEngine, RequestStats
from midfill.engine.api import Request
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import EngineError

PROMPT = tuple(map(ord, "x = "))


async def instrumented(rule):
    stats = RequestStats()
    engine = InstrumentedEngine(ScriptedEngine(Script([rule])), stats)
    await engine.start(lambda *_: None)
    return engine, stats


def only(stats):
    (work,) = stats.after(0)["work"]
    return work


async def read(engine, request, num_tokens=None):
    async with aclosing(engine.generate(request)) as tokens:
        async for _ in tokens:
            if num_tokens is not None and (num_tokens := num_tokens - 1) == 0:
                return


async def test_work_that_ends_by_itself_is_finished():
    engine, stats = await instrumented(Rule(text="abc"))
    await read(engine, Request(PROMPT, 8))
    work = only(stats)
    assert work["end"] == "finished"
    assert (work["promptTokens"], work["computedTokens"], work["reusedTokens"]) == (4, 4, 0)
    assert (work["generatedTokens"], work["deliveredTokens"]) == (3, 3)
    times = [work[name] for name in ("submittedS", "startedS", "firstTokenS", "lastTokenS", "freedS")]
    assert times == sorted(times)
    assert work["leftS"] >= work["lastTokenS"]


async def test_work_that_is_left_because_it_is_enough_is_stopped():
    engine, stats = await instrumented(Rule(text="abc"))
    await read(engine, Request(PROMPT, 8), 2)
    work = only(stats)
    assert (work["end"], work["deliveredTokens"]) == ("stopped", 2)
    assert work["freedS"] is not None


async def test_cancelled_work_is_not_lost():
    engine, stats = await instrumented(Rule(text="abc", hang=True))
    task = asyncio.create_task(read(engine, Request(PROMPT, 8)))
    await asyncio.sleep(0)
    assert only(stats)["end"] is None
    assert only(stats)["freedS"] is None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    work = only(stats)
    assert (work["end"], work["deliveredTokens"], work["firstTokenS"]) == ("cancelled", 0, None)
    assert work["freedS"] is not None


async def test_work_that_fails_says_so():
    engine, stats = await instrumented(Rule(text="abc", error="broken", error_after=1))
    with pytest.raises(EngineError):
        await read(engine, Request(PROMPT, 8))
    work = only(stats)
    assert (work["end"], work["deliveredTokens"]) == ("failed", 1)


async def test_work_and_answers_know_the_request_that_began_them():
    engine, stats = await instrumented(Rule(text="abc"))

    async def answer():
        await read(engine, Request(PROMPT, 8))
        stats.answered("model", None, 1.234)

    for id_ in (7, "eight"):
        REQUEST.set(id_)
        await asyncio.create_task(answer())
    found = stats.after(0)
    assert [work["request"] for work in found["work"]] == [7, "eight"]
    assert [answer["request"] for answer in found["answers"]] == [7, "eight"]
    assert [answer["latencyMs"] for answer in found["answers"]] == [1.23, 1.23]


async def test_only_what_is_new_is_told():
    engine, stats = await instrumented(Rule(text="abc"))
    await read(engine, Request(PROMPT, 8))
    stats.answered("model", None, 1.0)
    seen = stats.after(0)
    last = max(record["number"] for record in seen["work"] + seen["answers"])
    assert last == 2
    assert stats.after(last) == {"answers": [], "work": []}
    await read(engine, Request(PROMPT, 8))
    assert [work["number"] for work in stats.after(last)["work"]] == [3]


async def test_it_does_not_grow_without_end():
    engine, stats = await instrumented(Rule())
    for _ in range(5000):
        stats.answered("none", "disabled", 0.1)
        stats.begin(Request(PROMPT, 1))
    found = stats.after(0)
    assert len(found["answers"]) == len(found["work"]) == 4096
    assert found["work"][-1]["number"] == 10_000
    await engine.close()
