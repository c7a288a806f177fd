"""A cancelled request costs at most a part of the pass under way, and leaves its keys and values behind."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from random import Random

import pytest
import tiny

from midfill.engine.api import Request
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


async def test_a_pass_that_nobody_wants_is_left_in_the_middle(stepped):
    engine, runner = stepped
    runner.has_middle = True
    await cancelled(await tiny.start_and_reach_step(engine, runner, 2, LONG))
    runner.open()
    assert await tiny.collect_ids(engine, [7], 1) == [65]
    assert runner.left == [False, True, False]
    # What was computed before counts, what was left does not.
    await tiny.collect_ids(engine, LONG, 1)
    assert runner.steps == [[(0, 64)], [(64, 64)], [(0, 1)], [(64, 64)], [(128, 64)], [(192, 58)]]


async def test_a_pass_that_somebody_waits_for_is_not_left(stepped):
    engine, runner = stepped
    runner.has_middle = True
    first = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    newer = asyncio.create_task(tiny.collect_ids(engine, [1, 2, 3], 1))
    waiting = asyncio.create_task(tiny.collect_ids(engine, [4, 5], 1))
    await tiny.settle()
    await cancelled(waiting)
    runner.open()
    await asyncio.gather(first, newer)
    assert not any(runner.left)


@pytest.mark.parametrize("is_prewarm", [True, False], ids=["prewarm", "idle request"])
async def test_idle_work_is_left_in_the_middle_when_a_request_comes(stepped, is_prewarm):
    engine, runner = stepped
    runner.has_middle = True
    if is_prewarm:
        engine.prewarm(LONG)
    else:
        idle = asyncio.create_task(tiny.collect(engine, LONG, 2, idle=True))
    assert await runner.began.get() == 1
    typed = asyncio.create_task(tiny.collect_ids(engine, [9, 9], 1))
    await tiny.settle()
    runner.open()
    assert await typed == [65]
    while [(192, 58)] not in runner.steps:
        await runner.began.get()
    # It may be left once more: the end of the other request is a message, too.
    order = [step for number, step in enumerate(runner.steps) if step not in runner.steps[:number]]
    assert order[:5] == [[(0, 64)], [(0, 2)], [(64, 64)], [(128, 64)], [(192, 58)]]
    assert runner.left[:2] == [True, False]
    if not is_prewarm:
        assert [token.id for token in await idle] == [65, 65]


async def test_closing_does_not_wait_for_the_end_of_a_pass(stepped):
    engine, runner = stepped
    runner.has_middle = True
    task = await tiny.start_and_reach_step(engine, runner, 1, LONG)
    closing = asyncio.create_task(engine.close())
    await tiny.settle()
    runner.open()
    await closing
    assert runner.left == [True]
    with pytest.raises(EngineUnavailableError):
        await task


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
            max_draft_tokens = runner.max_draft_tokens
            drop = runner.drop
            idle = runner.idle

            def forward(self, chunks, allowed, interrupted):
                steps.append(len(chunks))
                if len(steps) == cancel_at:
                    # The loop cancels while this pass runs: the next thing the engine sees is the flag.
                    done = threading.Event()
                    loop.call_soon_threadsafe(lambda: (task.cancel(), loop.call_soon(done.set)))
                    assert done.wait(60)
                return forward(chunks, allowed, interrupted)

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


async def test_passes_left_in_the_middle_change_no_token(tmp_path):
    model = tiny.write_model("qwen2", tmp_path)
    reference = tiny.reference(tmp_path)
    random = Random(3)
    # Prompts that share beginnings of all lengths, more of them than there are slots.
    prompts: list[list[int]] = []
    while len(prompts) < 16:
        beginning = random.choice(prompts)[: random.randrange(200)] if prompts else []
        prompts.append(beginning + random.choices(range(256), k=random.randrange(60, 200)))
    answers = [tiny.oracle(reference, ids, 4, frozenset()) for ids in prompts]
    asked, cancel_at, left, task = 0, 0, [], None
    loop = asyncio.get_running_loop()

    def load_asking(spec, progress):
        loaded = load(spec, progress)
        forward = loaded.runner.forward

        def asking(chunks, allowed, interrupted):
            asked_after = None  # the cancellation, if it is in this pass

            def ask():
                nonlocal asked, asked_after
                asked += 1
                if asked_after is not None:
                    asked_after += 1
                if asked == cancel_at:
                    asked_after = 0
                    # The loop cancels while this pass is in its middle.
                    done = threading.Event()
                    loop.call_soon_threadsafe(lambda: (task.cancel(), loop.call_soon(done.set)))
                    assert done.wait(60)
                return interrupted()

            choices = forward(chunks, allowed, ask)
            if asked_after is not None:
                left.append(choices is None and asked_after == 0)
            return choices

        loaded.runner.forward = asking
        return loaded

    async with tiny.running(model, runner="openvino", load_model=load_asking, num_threads=1) as engine:
        num_cancelled = 0
        while num_cancelled < 200:
            number = random.randrange(len(prompts))
            cancel_at = asked + random.randrange(1, 9)
            task = asyncio.create_task(tiny.collect_ids(engine, prompts[number], 4))
            [found] = await asyncio.gather(task, return_exceptions=True)
            num_cancelled += isinstance(found, asyncio.CancelledError)
            cancel_at = 0
            # The same again, which goes on where it was left, or another one.
            number = random.choice([number, random.randrange(len(prompts))])
            assert await tiny.collect_ids(engine, prompts[number], 4) == answers[number]
        assert left == [True] * num_cancelled


async def test_closing_the_iterator_cancels(stepped):
    engine, runner = stepped
    stream = engine.generate(Request(tuple(LONG), 8))
    runner.leave.release(5)
    assert (await anext(stream)).id == 65
    await stream.aclose()
    runner.open()
    await tiny.collect_ids(engine, [7], 1)
    assert len(runner.steps) <= 8
