"""A model that hangs or dies costs its requests, not the server: the next ones are served by a fresh one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import tiny

from midfill.engine.factory import create
from midfill.engine.loading import load
from midfill.engine.local import LocalEngine
from midfill.engine.supervisor import Supervisor
from midfill.engine.torch.errors import memory_errors
from midfill.errors import EngineError, EngineUnavailableError, ModelError

LONG = list(range(250))


class Fleet:
    """A supervisor whose engines have a stepped runner each; the faults that loading should meet."""

    def __init__(self, model, **options):
        self.runners: list[tiny.SteppedRunner] = []
        self.engines: list[LocalEngine] = []
        self.load_errors: list[BaseException] = []
        self._model = model
        self.supervisor = Supervisor(self._make, **options)

    def _make(self):
        spec = tiny.EngineSpec(self._model, device="cpu", dtype="float32")
        self.engines.append(LocalEngine(spec, load=self._load))
        self.runners.append(tiny.SteppedRunner())
        return self.engines[-1]

    def _load(self, spec, progress):
        if len(self.runners) > 1 and self.load_errors:
            raise self.load_errors.pop(0)
        # A warm-up takes no time here, so that the limit is the one that the test gives.
        return replace(load(spec, progress), runner=self.runners[-1], warm_up_s=0.0)

    async def break_down(self, error=SystemExit):
        """The thread dies in the pass of a request."""
        runner = self.runners[-1]
        runner.error = error()
        runner.leave.release()
        with pytest.raises(EngineUnavailableError, match=error.__name__):
            await tiny.collect(self.supervisor, [1])

    async def restarted(self):
        if (task := self.supervisor._restart) is not None:
            await task

    async def finish(self):
        for runner in self.runners:
            runner.open()
        await self.supervisor.close()
        for engine in self.engines:
            if engine._thread is not None:
                engine._thread.join()


@pytest.fixture
async def start(tmp_path):
    fleets = []
    model = tiny.write_model("llama", tmp_path)

    async def start(**options):
        fleet = Fleet(model, **options)
        fleets.append(fleet)
        await fleet.supervisor.start(lambda *_: None)
        return fleet

    yield start
    for fleet in fleets:
        await fleet.finish()


async def test_a_pass_that_hangs_fails_its_requests_and_a_fresh_model_serves_the_next(start, caplog):
    fleet = await start(step_limit_s=0.05)
    hung = asyncio.create_task(tiny.collect_ids(fleet.supervisor, LONG, 8))
    waiting = asyncio.create_task(tiny.collect_ids(fleet.supervisor, [1, 2], 8))
    for lost in (hung, waiting):
        with pytest.raises(EngineUnavailableError, match="hung"):
            await lost
    with pytest.raises(EngineUnavailableError, match="being restarted"):
        await tiny.collect(fleet.supervisor, [1])
    await fleet.restarted()
    fleet.supervisor._step_limit_s = 1000.0
    fleet.runners[1].open()
    assert await tiny.collect_ids(fleet.supervisor, [1, 2, 3], 2) == [65, 65]
    assert len(fleet.engines) == 2
    assert fleet.engines[0]._thread.is_alive()
    # If the pass ends after all, its thread goes, and disturbs nobody.
    fleet.runners[0].open()
    fleet.engines[0]._thread.join()
    assert len(fleet.runners[0].steps) == 1
    assert await tiny.collect_ids(fleet.supervisor, [1, 2, 3], 1) == [65]


async def test_a_hanging_pass_is_noticed_when_its_request_was_cancelled(start, caplog):
    fleet = await start(step_limit_s=0.05)
    task = asyncio.create_task(tiny.collect_ids(fleet.supervisor, LONG, 8))
    assert await fleet.runners[0].began.get() == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await fleet.engines[0]._ended.wait()
    await fleet.restarted()
    assert "hung" in fleet.engines[0].lost
    assert len(fleet.engines) == 2


async def test_a_pass_that_was_only_stopped_for_a_while_is_not_given_up(start):
    # As after the whole process was stopped: the pass is late, but it ends soon.
    fleet = await start(step_limit_s=1000.0)
    supervisor, engine, runner = fleet.supervisor, fleet.engines[0], fleet.runners[0]
    task = await tiny.start_and_reach_step(supervisor, runner, 1, LONG)
    engine._shared.step_started_s -= 5000
    supervisor._timer.cancel()
    supervisor._check()
    runner.leave.release()
    assert await runner.began.get() == 2
    engine._shared.step_started_s -= 5000
    supervisor._timer.cancel()
    supervisor._check()
    runner.open()
    assert await task == [65] * 8
    assert len(fleet.engines) == 1


async def test_slow_machines_get_more_time(start):
    fleet = await start(step_limit_s=10.0)
    assert fleet.supervisor._limit_s == 10.0
    fleet.engines[0]._loaded = replace(fleet.engines[0]._loaded, warm_up_s=3.0)
    assert fleet.supervisor._limit_s == 60.0


async def test_nothing_is_watched_when_nothing_runs(start):
    fleet = await start(step_limit_s=1000.0)
    supervisor = fleet.supervisor
    assert supervisor._timer is None
    fleet.runners[0].open()
    await tiny.collect_ids(supervisor, LONG, 3)
    timer = supervisor._timer
    await tiny.collect_ids(supervisor, LONG, 3)
    assert supervisor._timer is timer
    while not fleet.engines[0].idle:
        await asyncio.sleep(0)
    timer.cancel()
    supervisor._check()
    assert supervisor._timer is None


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
async def test_a_thread_that_dies_in_a_pass_is_replaced(start, caplog, error):
    fleet = await start()
    await fleet.break_down(error)
    await fleet.restarted()
    fleet.runners[1].open()
    assert await tiny.collect_ids(fleet.supervisor, [1, 2, 3], 2) == [65, 65]
    assert fleet.supervisor.model.architecture == "llama"


async def test_a_thread_that_dies_between_passes_is_replaced(start, caplog):
    # The loop itself fails: the runner leaves out a result.
    fleet = await start()
    fleet.runners[0].forward = lambda *_: []
    with pytest.raises(EngineUnavailableError, match="ValueError"):
        await tiny.collect(fleet.supervisor, [1])
    await fleet.restarted()
    fleet.runners[1].open()
    assert await tiny.collect_ids(fleet.supervisor, [1], 1) == [65]


async def test_a_thread_that_died_while_nobody_waited_is_replaced_at_the_next_request(start, caplog):
    fleet = await start()
    fleet.runners[0].error = SystemExit()
    fleet.runners[0].open()
    fleet.supervisor.prewarm([1, 2])
    await fleet.engines[0]._ended.wait()
    with pytest.raises(EngineUnavailableError, match="being restarted"):
        await tiny.collect(fleet.supervisor, [1])
    await fleet.restarted()
    fleet.runners[1].open()
    assert await tiny.collect_ids(fleet.supervisor, [1], 1) == [65]


async def test_a_step_that_raises_needs_no_restart(start, caplog):
    fleet = await start()
    runner = fleet.runners[0]
    runner.error = RuntimeError("kernel")
    runner.open()
    with pytest.raises(EngineError, match="RuntimeError"):
        await tiny.collect(fleet.supervisor, [1])
    assert await tiny.collect_ids(fleet.supervisor, [1], 1) == [65]
    assert len(fleet.engines) == 1


async def test_restarts_are_limited_and_then_said_once(start, caplog):
    fleet = await start()
    for _ in range(3):
        await fleet.break_down()
        await fleet.restarted()
    await fleet.break_down()
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match="restarted 3 times within 10 minutes"):
            await tiny.collect(fleet.supervisor, [1])
    assert len(fleet.engines) == 4
    said = [record for record in caplog.records if "restarted 3 times" in record.getMessage()]
    assert len(said) == 1
    # Ten minutes later it may be tried again.
    began = fleet.supervisor._restarts
    began.extend([at - 600 for at in began])
    with pytest.raises(EngineUnavailableError, match="is being restarted"):
        await tiny.collect(fleet.supervisor, [1])
    await fleet.restarted()
    fleet.runners[4].open()
    assert await tiny.collect_ids(fleet.supervisor, [1], 1) == [65]


async def test_a_restart_that_fails_is_said_and_tried_again(start, caplog):
    fleet = await start()
    fleet.load_errors = [MemoryError()]
    await fleet.break_down()
    await fleet.restarted()
    with pytest.raises(EngineUnavailableError, match="could not be restarted: There is not enough memory"):
        await tiny.collect(fleet.supervisor, [1])
    await fleet.restarted()
    fleet.runners[2].open()
    assert await tiny.collect_ids(fleet.supervisor, [1], 1) == [65]


async def test_closing_during_a_restart_ends_it(start, caplog):
    fleet = await start()
    await fleet.break_down()
    await fleet.supervisor.close()
    await fleet.supervisor.close()
    assert fleet.supervisor._restart is None
    with pytest.raises(EngineUnavailableError, match="shut down"):
        await tiny.collect(fleet.supervisor, [1])
    with pytest.raises(EngineUnavailableError):
        _ = fleet.supervisor.model


async def test_closing_waits_for_a_hanging_pass_no_longer_than_its_limit(start, caplog):
    fleet = await start(step_limit_s=0.05)
    task = await tiny.start_and_reach_step(fleet.supervisor, fleet.runners[0], 1, LONG)
    await fleet.supervisor.close()
    with pytest.raises(EngineUnavailableError):
        await task
    assert len(fleet.engines) == 1


async def test_a_model_that_cannot_be_loaded_is_not_tried_again(tmp_path):
    engine = create(tiny.EngineSpec(tiny.LocalModel("none", tmp_path), device="cpu"))
    with pytest.raises(ModelError):
        await engine.start(lambda *_: None)
    for _ in range(2):
        with pytest.raises(EngineUnavailableError, match=r"cannot be read|no model\.safetensors"):
            await tiny.collect(engine, [1])
    await engine.close()


async def test_out_of_memory_while_loading_is_a_sentence(tmp_path):
    model = tiny.write_model("llama", tmp_path)

    def load_too_much(spec, progress):
        # What torch raises is no MemoryError.
        with memory_errors():
            tiny.torch.empty(1 << 60, dtype=tiny.torch.int8)

    with pytest.raises(EngineError, match="not enough memory for tiny-llama"):
        async with tiny.running(model, load_model=load_too_much):
            pass
