"""A cancelled request costs at most the forward pass under way, and leaves its keys and values behind."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
import tiny

from midfill.engine import Request
from midfill.engine.loading import load
from midfill.errors import EngineError, EngineOverloadedError, EngineUnavailableError

LONG = list(range(250))


@pytest.fixture
async def stepped(tmp_path):
    model = tiny.write_model("llama", tmp_path)
    runners = []

    def load_stepped(spec, progress):
        loaded = load(spec, progress)
        return replace(loaded, runner=runners[0])

    runners.append(tiny.SteppedRunner())
    async with tiny.running(model, load_model=load_stepped) as engine:
        yield engine, runners[0]
        runners[0].open()


async def cancelled(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7], ids=lambda step: f"step{step}")
async def test_cancelling_frees_the_model_after_the_pass_under_way(stepped, step):
    # 250 tokens are four passes; the fifth and later ones decode.
    engine, runner = stepped
    task = await tiny.start_and_reach_step(engine, runner, step, LONG)
    await cancelled(task)
    runner.open()
    assert await tiny.collect_ids(engine, [7], 1) == [65]
    assert len(runner.steps) == step + 1


async def test_a_request_cancelled_while_it_waits_is_never_computed(stepped):
    engine, runner = stepped
    first = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    waiting = asyncio.create_task(tiny.collect_ids(engine, [1, 2, 3], 5))
    await tiny.settle()
    await cancelled(waiting)
    runner.open()
    assert await first == [65] * 8
    assert len(runner.steps) == 4 + 7


async def test_what_a_cancelled_request_has_cost_is_known(stepped):
    engine, runner = stepped
    request, waiting = Request(tuple(LONG), 8), Request((1, 2, 3), 8)

    async def read(request):
        async for _ in engine.generate(request):
            pass

    task = asyncio.create_task(read(request))
    assert await runner.began.get() == 1
    behind = asyncio.create_task(read(waiting))
    await tiny.settle()
    await cancelled(behind)
    await cancelled(task)
    stats = request.stats
    assert stats.ended_s == 0.0  # the pass is still under way
    runner.open()
    assert await tiny.collect_ids(engine, [7], 1) == [65]
    assert (stats.num_prompt, stats.num_computed, stats.num_generated) == (250, 64, 0)
    assert stats.submitted_s <= stats.started_s < stats.ended_s
    assert waiting.stats.num_computed == 0
    assert waiting.stats.ended_s > 0.0


async def test_the_tokens_of_the_prompt_that_were_computed_are_counted(stepped):
    engine, runner = stepped
    runner.open()
    first, again = Request(tuple(LONG), 3), Request((*LONG, 7), 3)
    for request in (first, again):
        async for _ in engine.generate(request):
            pass
    assert (first.stats.num_reused, first.stats.num_computed) == (0, 250)
    assert again.stats.num_reused + again.stats.num_computed == again.stats.num_prompt == 251
    assert again.stats.num_reused == 250


async def test_a_newer_request_runs_after_the_pass_under_way(stepped):
    engine, runner = stepped
    old = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    new = asyncio.create_task(tiny.collect_ids(engine, [1, 2, 3], 1))
    await tiny.settle()
    runner.open()
    await asyncio.gather(old, new)
    assert runner.steps[:3] == [[(0, 64)], [(0, 3)], [(64, 64)]]


async def test_the_kept_past_of_a_cancelled_request_is_reused(stepped):
    engine, runner = stepped
    await cancelled(await tiny.start_and_reach_step(engine, runner, 3, LONG))
    runner.open()
    await tiny.collect_ids(engine, LONG, 1)
    assert runner.steps[3:] == [[(192, 58)]]


async def test_a_prewarm_stands_aside_within_one_step(stepped):
    engine, runner = stepped
    engine.prewarm(LONG)
    assert await runner.began.get() == 1
    typed = asyncio.create_task(tiny.collect_ids(engine, [9, 9], 2))
    await tiny.settle()
    runner.open()
    await typed
    assert runner.steps[:3] == [[(0, 64)], [(0, 2)], [(2, 1)]]
    while len(runner.steps) < 6:
        await runner.began.get()
    assert runner.steps[3:] == [[(64, 64)], [(128, 64)], [(192, 58)]]


async def test_what_was_put_off_is_done_in_a_pause_piece_by_piece(stepped):
    engine, runner = stepped
    task = await tiny.start_and_reach_step(engine, runner, 1, [1, 2])
    runner.put_off = 3
    runner.open()
    await task
    assert runner.put_off == 3
    while await runner.began.get() != 0:
        pass
    assert runner.put_off == 0
    await tiny.collect_ids(engine, [7], 1)


async def test_an_idle_request_stands_aside_within_one_step(stepped):
    engine, runner = stepped
    idle = asyncio.create_task(tiny.collect(engine, LONG, 2, idle=True))
    assert await runner.began.get() == 1
    typed = asyncio.create_task(tiny.collect_ids(engine, [9, 9], 2))
    await tiny.settle()
    runner.open()
    assert await typed == [65, 65]
    assert [token.id for token in await idle] == [65, 65]
    assert runner.steps == [[(0, 64)], [(0, 2)], [(2, 1)], [(64, 64)], [(128, 64)], [(192, 58)], [(250, 1)]]


async def test_an_idle_request_that_somebody_waits_for_is_a_request_like_any_other(stepped):
    engine, runner = stepped
    request = Request((7, 8), 2, idle=True)
    idle = asyncio.create_task(anext(engine.generate(request)))
    assert await runner.began.get() == 1
    older = asyncio.create_task(tiny.collect_ids(engine, LONG, 1))
    await tiny.settle()
    request.idle = False
    runner.open()
    assert (await idle).id == 65
    assert await older == [65]


async def test_a_newer_prewarm_replaces_an_older_one(stepped):
    engine, runner = stepped
    engine.prewarm(LONG)
    assert await runner.began.get() == 1
    engine.prewarm([5, 6, 7])
    runner.leave.release()
    assert await runner.began.get() == 2
    assert runner.steps == [[(0, 64)], [(0, 3)]]


async def test_closing_ends_running_and_later_requests(stepped):
    engine, runner = stepped
    task = await tiny.start_and_reach_step(engine, runner, 2, LONG)
    closing = asyncio.create_task(engine.close())
    await tiny.settle()
    runner.open()
    await closing
    await engine.close()
    with pytest.raises(EngineUnavailableError):
        await task
    with pytest.raises(EngineUnavailableError):
        await tiny.collect(engine, [1])
    with pytest.raises(EngineUnavailableError):
        _ = engine.model
    engine.prewarm([1])
    assert len(runner.steps) == 2


async def test_a_failed_step_fails_only_its_request(stepped, caplog):
    engine, runner = stepped
    old = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    new = asyncio.create_task(tiny.collect_ids(engine, [1, 2, 3], 1))
    await tiny.settle()
    runner.leave.release()
    assert await runner.began.get() == 2
    runner.error = RuntimeError("kernel")
    runner.open()
    with pytest.raises(EngineError, match="RuntimeError"):
        await new
    assert await old == [65] * 8
    # Nothing of the failed request is reused.
    await tiny.collect_ids(engine, [1, 2, 3, 4], 1)
    assert runner.steps[-1] == [(0, 4)]


async def test_out_of_memory_fails_the_request_and_drops_the_idle_slots(stepped):
    engine, runner = stepped
    runner.leave.release(100)
    await tiny.collect_ids(engine, LONG, 1)
    await tiny.collect_ids(engine, [200, 201], 1)
    runner.error = MemoryError()
    with pytest.raises(EngineError, match="not enough memory"):
        await tiny.collect_ids(engine, [100], 1)
    assert sorted(slot for slots in runner.dropped for slot in slots) == [0, 1, 2, 2, 3]
    await tiny.collect_ids(engine, LONG, 1)
    assert runner.steps[-4][0] == (0, 64)


async def test_all_is_freed_before_a_failed_request_hears_of_it(stepped):
    engine, runner = stepped
    frees, may_free = asyncio.Event(), threading.Event()

    def drop(_slots):
        runner.loop.call_soon_threadsafe(frees.set)
        assert may_free.wait(timeout=60)

    runner.drop, runner.error = drop, MemoryError()
    runner.open()
    asked = asyncio.create_task(tiny.collect_ids(engine, [100], 1))
    await asyncio.wait_for(frees.wait(), 60)
    await tiny.settle()
    heard = asked.done()
    may_free.set()
    with pytest.raises(EngineError, match="not enough memory"):
        await asked
    assert not heard


async def test_an_engine_thread_that_dies_says_so_to_everybody(stepped, caplog):
    engine, runner = stepped
    task = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    waiting = asyncio.create_task(tiny.collect_ids(engine, [1], 1))
    await tiny.settle()
    runner.error = SystemExit()
    runner.open()
    for lost in (task, waiting):
        with pytest.raises(EngineUnavailableError, match="SystemExit"):
            await lost
    with pytest.raises(EngineUnavailableError, match="SystemExit"):
        await tiny.collect(engine, [1])


async def test_a_full_queue_refuses(stepped):
    engine, runner = stepped
    first = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    others = [asyncio.create_task(tiny.collect_ids(engine, [1], 1)) for _ in range(64)]
    await tiny.settle()
    runner.open()
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert [type(result) for result in results].count(EngineOverloadedError) == 1
    assert isinstance(results[-1], EngineOverloadedError)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([1] * 512, "at most 511"),
        ([-1], "does not know"),
        ([tiny.VOCAB_SIZE], "does not know"),
    ],
)
async def test_an_impossible_prompt_is_refused(stepped, ids, message):
    engine, runner = stepped
    with pytest.raises(EngineError, match=message):
        await tiny.collect(engine, ids)
    assert runner.steps == []


async def test_a_request_before_the_start_is_refused(tmp_path):
    engine = tiny.LocalEngine(tiny.EngineSpec(tiny.LocalModel("none", tmp_path)))
    with pytest.raises(EngineUnavailableError, match="not loaded"):
        await tiny.collect(engine, [1])
    await engine.close()


@pytest.mark.parametrize("kind", ["gpt_bigcode", "qwen2", "llama"])
async def test_after_a_cancellation_the_tokens_still_equal_generate(tmp_path, kind):
    model = tiny.write_model(kind, tmp_path)
    reference = tiny.reference(tmp_path)
    generator = tiny.torch.Generator().manual_seed(11)
    ids = tiny.random_ids(generator, 300)
    steps: list[int] = []
    cancel_at = 0
    task = None

    def load_counting(spec, progress):
        loaded = load(spec, progress)
        runner = loaded.runner
        forward = runner.forward

        class Counting:
            context = runner.context
            vocab_size = runner.vocab_size
            chunk_tokens = runner.chunk_tokens
            step_sequences = runner.step_sequences
            max_guesses = runner.max_guesses
            drop = runner.drop
            idle = runner.idle

            def forward(self, chunks, allowed):
                steps.append(len(chunks))
                if len(steps) == cancel_at:
                    # The loop cancels while this pass runs: the next thing the engine sees is the flag.
                    done = threading.Event()
                    loop.call_soon_threadsafe(lambda: (task.cancel(), loop.call_soon(done.set)))
                    assert done.wait(60)
                return forward(chunks, allowed)

        return replace(loaded, runner=Counting())

    loop = asyncio.get_running_loop()
    async with tiny.running(model, load_model=load_counting) as engine:
        control = engine.model.tokenizer.control_ids
        # Passes 1 to 5 compute the prompt, later ones decode.
        for at in (2, 4, 6, 8):
            cancel_at = len(steps) + at
            prompt = [at, *ids]
            task = asyncio.create_task(tiny.collect_ids(engine, prompt, 8))
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await tiny.collect_ids(engine, prompt, 8) == tiny.oracle(reference, prompt, 8, control)


async def test_closing_the_iterator_cancels(stepped):
    engine, runner = stepped
    stream = engine.generate(Request(tuple(LONG), 8))
    runner.leave.release(5)
    assert (await anext(stream)).id == 65
    await stream.aclose()
    runner.open()
    await tiny.collect_ids(engine, [7], 1)
    assert len(runner.steps) <= 8
