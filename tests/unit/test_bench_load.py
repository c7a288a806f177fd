"""Many typists against one engine: that the load is what it says, and what is made of it."""

import json
import socket
import time
from contextlib import aclosing

import pytest
from click.testing import CliRunner
from clock import in_its_own_time

from midfill.bench import load, virtual_user
from midfill.bench.backends import EngineJob, SuggestionRequest
from midfill.bench.load import BenchSetup, Goal, LoadPlan
from midfill.cli.main import cli
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import EngineUnavailableError
from midfill.fim.templates import FAMILIES
from midfill.settings import Settings

FAMILY = ("qwen2.5-coder", FAMILIES["qwen2.5-coder"])
AREAS = "".join(f"def area_{n}(width, height):\n    return {n} * width * height\n\n\n" for n in range(20))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "area.py").write_text(AREAS)
    return folder


async def stage_of(source, engine):
    await engine.start(lambda _message, _share: None)
    return BenchSetup(engine, FAMILY, Settings(), virtual_user.generate(source, 1, 6))


def a_request(at_s, **values):
    return SuggestionRequest(
        0, 100 + at_s, **{key: 100 + v if key.endswith("_s") else v for key, v in values.items()}
    )


@in_its_own_time
async def test_typists_ask_one_engine_and_the_next_key_takes_requests_back(source):
    engine = ScriptedEngine(Script([Rule(text="fill()", prefill_delay_s=0.06, logprob=-0.01)]))
    load_run = await load.play(await stage_of(source, engine), LoadPlan(8, 4.0, warm_s=0.0))
    found = load.measured(load_run)
    assert len(load_run.requests) >= found["requests"] > 40
    assert found["failed"] == 0
    # The engine takes 60 ms for each, most gaps are shorter; who pauses longer is served.
    assert 0.1 < found["cancelled_share"] < 0.99
    assert found["suggestion_ms"]["p50"] > 55
    assert found["shown_before_next_key_share"] + found["cancelled_share"] <= 1.0
    assert 0 < found["engine_requests_per_s"] <= found["requests_per_s"]
    assert {job.end for job in load_run.jobs} == {"finished", "cancelled"}
    assert found["generator_cores"] > 0


async def test_an_order_is_its_seeds_and_each_typist_has_one_of_its_own():
    def first(plan, user):
        delay_s, numbers = plan.order(user, 50)
        return delay_s, [next(numbers) for _ in range(120)]

    plan = LoadPlan(2, 1.0, seed=3)
    assert first(plan, 0) == first(plan, 0) != first(plan, 1)
    assert first(plan, 0) != first(LoadPlan(2, 1.0, seed=4), 0)
    assert sorted(first(plan, 0)[1][:50]) == list(range(50))


class Blocking(ScriptedEngine):
    """One that keeps the event loop, as a generator does that has too many typists."""

    async def generate(self, request):
        time.sleep(0.02)  # noqa: ASYNC251 - that is the fault
        async with aclosing(super().generate(request)) as tokens:
            async for token in tokens:
                yield token


async def test_a_generator_that_is_too_slow_itself_says_so(source):
    slow = await stage_of(source, Blocking(Script([Rule(text="x")])))
    assert load.measured(await load.play(slow, LoadPlan(24, 2.5, warm_s=0.0)))["generator_kept_up"] is False


def test_what_was_asked_before_everybody_was_warm_does_not_count():
    early, late = a_request(1, answered_s=3, text="a"), a_request(6, answered_s=6.1, text="a", source="model")
    found = load.figures([early, late], [], 100.0, LoadPlan(1, 10.0))
    assert (found["requests"], found["suggestion_ms"]["p95"]) == (1, 100.0)


def test_waiting_is_told_as_seen_and_as_it_would_be_if_nobody_typed_on():
    quick = [a_request(6, answered_s=6.1, text="a", source="model") for _ in range(2)]
    reused = a_request(7, answered_s=7.001, text="b", source="typed-through")
    gated = a_request(7, answered_s=7.001, source="none", reason="mid-word")
    slow = a_request(8, answered_s=9, source="none", reason="model-silent")
    gone = a_request(8, cancelled_s=8.5, answered_s=8.5, code=-32800)
    found = load.figures([*quick, reused, gated, slow, gone], [], 100.0, LoadPlan(1, 10.0))
    assert found["suggestion_ms"]["p50"] == found["model_ms"]["p50"] == 100.0
    assert found["samples"] == {"suggestion_ms": 3, "model_ms": 2, "awaited_ms": 3}
    # Of four who had to wait for the model, two did for longer than 0.1 s: one of them gave up after 0.5 s.
    assert (found["awaited_ms"]["p50"], found["awaited_ms"]["p95"]) == (100.0, 1000.0)
    assert found["shown_before_next_key_share"] == 0.5
    assert found["cancelled_share"] == pytest.approx(1 / 6, abs=1e-4)


@in_its_own_time
async def test_what_the_engine_fails_to_answer_has_failed_and_was_not_served(source):
    rules = [Rule(error="out of memory")]
    found = load.measured(
        await load.play(await stage_of(source, ScriptedEngine(Script(rules))), LoadPlan(2, 3.0, warm_s=0.0))
    )
    assert found["failed"] > 0
    assert found["failures"] == {"out of memory": found["failed"]}
    assert (found["answers_per_s"], found["samples"]["awaited_ms"]) == (0.0, 0)
    run = found | {"users": 2}
    said = load.table({"model": "scripted", "seconds": 3.0, "runs": [run]}).caption
    assert f"2 users: {found['failed']} requests failed: out of memory" in said


def test_work_counts_from_when_the_engine_was_asked():
    def job(**values):
        return EngineJob(0, 1, "cancelled", **values)

    # The last one was left before the engine was asked.
    jobs = [job(submitted_s=103.0, first_s=106.0), job(submitted_s=106.0), job(submitted_s=107.0), job()]
    assert load.figures([], jobs, 100.0, LoadPlan(1, 10.0))["engine_requests_per_s"] == 0.4


def test_what_a_server_does_not_tell_is_not_taken_for_nothing():
    def job(**values):
        return EngineJob(0, 1, "finished", num_prompt=100, submitted_s=106.0, **values)

    silent = job(num_reused=0, num_computed=0)
    told = [silent, job(num_reused=75, num_computed=25)]
    assert load.figures([], [silent], 100.0, LoadPlan(1, 10.0))["prompt_tokens_reused_share"] is None
    assert load.figures([], told, 100.0, LoadPlan(1, 10.0))["prompt_tokens_reused_share"] == 0.75


def run_of(users, p95, shown):
    return {"users": users, "suggestion_ms": {"p95": p95}, "shown_before_next_key_share": shown}


@pytest.mark.parametrize(
    ("last", "users", "why"),
    [
        ((8, 200.0, 0.6), None, "not reached"),
        ((8, 300.0, 0.6), 8, "p95 is 300 ms; the limit is 250 ms"),
        ((8, None, 0.0), 8, "no suggestion came in time; the limit is 250 ms"),
        ((8, 200.0, 0.4), 8, "40.0% are shown before the next key, less than 80% of 60.0%"),
    ],
)
def test_where_it_saturates_is_the_first_run_that_is_too_slow_or_serves_too_few(last, users, why):
    runs = [run_of(1, 100.0, 0.6), run_of(2, 150.0, 0.5), run_of(*last)]
    assert load.saturation(runs, Goal(250.0)) == {"users": users, "why": why}


def test_what_stands_in_for_an_engine_is_not_measured(source, tmp_path, monkeypatch):
    (tmp_path / "config.toml").write_text("engine_fallback = true\n")
    monkeypatch.setenv("MIDFILL_CONFIG", str(tmp_path / "config.toml"))
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    done = CliRunner().invoke(cli, ["bench", "load", "--files", str(source), "--engine", url])
    assert isinstance(done.exception, EngineUnavailableError)


def test_the_command_prints_the_runs(source, tmp_path):
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"rules": [{"text": "fill()", "logprob": -0.01}]}))
    options = ["--files", str(source), "--duration", "6", "--users", "3", "--engine", f"scripted:{script}"]
    done = CliRunner().invoke(cli, ["bench", "load", *options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [run["users"] for run in found["runs"]] == [3]
    assert found["runs"][0]["requests"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trace", "/no/such/trace"], "Cannot read /no/such/trace: there is no such file. Check the path."),
        ([], "Give either a TRACE (a file of recorded typing) or --files DIR (a source tree)."),
        (["--trace", "x", "--users", "0,many"], "'0,many' is not a list of numbers from 1 to 100000"),
    ],
)
def test_what_is_missing_is_said(options, said):
    done = CliRunner().invoke(cli, ["bench", "load", *options])
    assert done.exit_code != 0
    assert said in done.output + str(done.exception)
