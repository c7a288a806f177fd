"""The simulation by itself, and beside what is measured on an engine whose steps take a known time."""

import json
import math
from contextlib import asynccontextmanager
from dataclasses import replace

import paced
import pytest
from click.testing import CliRunner
from clock import in_its_own_time

from midfill.bench import load, simulation, sizing, virtual_user
from midfill.bench.engine_profile import (
    CAPACITIES,
    Capacity,
    CompletionCost,
    EngineProfile,
    SessionProfile,
    profile_engine,
)
from midfill.bench.load import BenchSetup, Goal, LoadPlan
from midfill.bench.simulation import ReplicaSet
from midfill.cli.main import cli
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.openvino import runner as openvino_runner
from midfill.engine.torch import devices, runner
from midfill.errors import MidfillError
from midfill.fim.templates import FAMILIES
from midfill.settings import Settings

FAMILY = ("qwen2.5-coder", FAMILIES["qwen2.5-coder"])
SECONDS = 30.0

# A key every half second, and a request behind each; nothing that was written holds for the next.
KEYS = tuple((0.5, 0.05) for _ in range(20))
COSTS = {
    key: CompletionCost(
        num_prompt=100 + key, num_same=99 + key if key else 0, steps=9, held=0, chars=10, shown=10
    )
    for key in range(20)
}
BATCHES = Capacity(slots=400, sequences=200, chunk_tokens=10_000)
PROFILE = EngineProfile(
    engine="made up",
    where="nowhere",
    capacity=BATCHES,
    step_ms=((1, 10.0), (2, 12.0)),
    begin_ms=0.0,
    prefill_ms_per_token=0.1,
    overhead_ms=5.0,
    reuse_ms=1.0,
    deadline_s=10.0,
    sessions=(SessionProfile(KEYS, 0.5, COSTS, {}),),
)


def write_files(folder):
    """What is typed into files that have nothing in common, so that no two prompts have."""
    for number in range(200):
        functions = [
            f"def area_{number}_{n}(width, height):\n    return {n + number} * width * height\n\n\n"
            for n in range(20)
        ]
        (folder / f"area_{number}.py").write_text("".join(functions))
    return virtual_user.generate(folder, 2, 6)


@in_its_own_time
async def test_the_prediction_is_within_a_fifth_of_what_is_measured(tmp_path):
    """The real thread, scheduler, slots and pipelines; from one who is served at once to too many."""
    sessions = write_files(tmp_path)
    async with profiled(paced.engine(), sessions) as (setup, profile):
        assert profile.step_ms == ((1, 3.0), (2, 3.6), (4, 4.8))
        assert profile.prefill_ms_per_token == pytest.approx(0.1, abs=0.001)
        assert (profile.overhead_ms, profile.reuse_ms) == (0.0, 0.0)
        # With eight it is saturated, and so long are the tails that half a minute has too few of them.
        for users, seconds, most in ((1, 35.0, 0.05), (2, 35.0, 0.05), (4, 35.0, 0.05), (8, 120.0, 0.2)):
            assert await off(setup, profile, users, seconds) <= most, users


@in_its_own_time
async def test_the_prediction_holds_for_more_typists_on_a_quicker_engine(tmp_path):
    quick = paced.engine(step_s=0.0005, sequence_s=0.00005, token_s=0.00001)
    async with profiled(quick, write_files(tmp_path)) as (setup, profile):
        assert await off(setup, profile, 32, 20.0) <= 0.2


@asynccontextmanager
async def profiled(engine, sessions):
    await engine.start(lambda _message, _share: None)
    setup = BenchSetup(engine, FAMILY, Settings(), sessions)
    yield setup, await profile_engine(setup, lambda _message, _share: None)
    await engine.close()


async def off(setup, profile, users, seconds=35.0):
    """By how much the prediction is off."""
    plan = LoadPlan(users, seconds)
    measured = load.measured(await load.play(setup, plan))
    predicted = simulation.predict(profile, plan)
    assert predicted["requests"] == pytest.approx(measured["requests"], abs=1)
    ratios = load.compare(measured, predicted)
    print(users, json.dumps({"measured": measured, "predicted": predicted, "ratios": ratios}))
    return max(abs(ratios[name] - 1.0) for name in ("suggestion_p50", "suggestion_p95", "shown_share"))


def test_capacities_are_those_of_the_engines():
    cpu, cuda = CAPACITIES["midfill, cpu"], CAPACITIES["midfill, cuda"]
    openvino = openvino_runner.OpenVinoRunner
    assert (cpu.slots, cpu.sequences, cpu.chunk_tokens, cpu.parts) == (
        NUM_SLOTS,
        openvino.step_sequences,
        openvino.chunk_tokens,
        openvino_runner._NUM_PARTS,
    )
    assert cuda.sequences == runner.TorchRunner.step_sequences
    assert cuda.chunk_tokens == devices.KINDS["cuda"].chunk_tokens


def test_one_typist_waits_for_the_steps_of_each_request():
    found = simulation.predict(PROFILE, LoadPlan(1, SECONDS))
    # The step that reads the last token and chooses the first, and nine more.
    assert found["suggestion_ms"] == dict.fromkeys(("p50", "p95", "p99"), 105.0)
    assert found["shown_before_next_key_share"] == 1.0
    assert found["engine_requests_per_s"] == found["requests_per_s"]


def test_those_who_type_at_once_share_steps():
    found = simulation.predict(PROFILE, LoadPlan(8, SECONDS), ReplicaSet())
    # If all eight typed in step, steps would take 24 ms; if they shared none, each would take its ten.
    assert 105 < found["suggestion_ms"]["p95"] < 245
    assert found["shown_before_next_key_share"] > 0.95


def test_an_engine_that_takes_one_request_after_the_other_is_saturated_early():
    one = replace(PROFILE, capacity=Capacity(slots=400, sequences=1, chunk_tokens=10_000))
    batched, queued = (
        simulation.predict(profile, LoadPlan(12, SECONDS), ReplicaSet())["answers_per_s"]
        for profile in (PROFILE, one)
    )
    # Ten steps of 10 ms: ten requests a second, of 24 that are asked.
    assert queued <= 10.5
    assert batched > 20


def test_what_holds_is_typed_through_and_what_is_contradicted_is_taken_back():
    holds = tuple((n, n) for n in range(1, 6))
    cost = replace(COSTS[0], follow=(*holds, (6, 5)), chars=8, shown=8)
    covered = dict.fromkeys(range(1, 6), 0)
    session = SessionProfile(KEYS[:7], 0.5, {0: cost, 6: COSTS[6]}, covered)
    found = simulation.predict(replace(PROFILE, sessions=(session,)), LoadPlan(1, SECONDS))
    assert found["suggestion_ms"]["p50"] == 1.0
    assert found["shown_before_next_key_share"] == 1.0
    assert found["engine_requests_per_s"] == pytest.approx(2 / 7 * found["requests_per_s"], rel=0.1)
    # The typist goes on at once with something else.
    quick = SessionProfile(tuple((0.08, 0.05) for _ in range(20)), 0.5, COSTS, {})
    found = simulation.predict(replace(PROFILE, sessions=(quick,)), LoadPlan(1, SECONDS))
    assert found["cancelled_share"] > 0.9


@pytest.mark.parametrize(("parts", "waited_ms"), [(1, 510), (6, 0)])
def test_a_step_that_nobody_waits_for_is_left_at_the_end_of_a_part(parts, waited_ms):
    # The second key is elsewhere. A step of 606 ms for the first has begun by then.
    cost = CompletionCost(num_prompt=597, num_same=0, steps=0, held=0, chars=10, shown=10, follow=((0, -1),))
    session = SessionProfile(((1.0, 0.05), (0.1, 0.05)), 3.0, {0: cost, 1: cost}, {})
    capacity = replace(BATCHES, parts=parts)
    slow = replace(PROFILE, capacity=capacity, prefill_ms_per_token=1.0, sessions=(session,) * 40)
    found = simulation.predict(slow, LoadPlan(1, SECONDS))
    # 1.050, where it begins, and 1.150, where the next is asked for; 1.151 is the end of a part.
    assert found["suggestion_ms"]["p50"] == pytest.approx(606 + 5 + waited_ms, abs=5)
    assert found["cancelled_share"] == pytest.approx(0.5, abs=0.1)


def test_a_step_that_was_left_is_gone_on_with():
    # As above, but the prompts begin alike, and are read in two steps of 309 ms.
    costs = {key: CompletionCost(600, 599 * key, 0, 0, 10, 10, ((0, -1),)) for key in (0, 1)}
    session = SessionProfile(((1.0, 0.05), (0.1, 0.05)), 3.0, costs, {})
    capacity = replace(BATCHES, slots=1, chunk_tokens=300, parts=6)
    slow = replace(PROFILE, capacity=capacity, prefill_ms_per_token=1.0, sessions=(session,) * 40)
    found = simulation.predict(slow, LoadPlan(1, SECONDS))
    # A sixth of the first step is done when the second request comes.
    assert found["suggestion_ms"]["p50"] == pytest.approx(309 * 11 / 6 + 5, abs=1)


def test_the_same_seed_gives_the_same_figures():
    assert simulation.predict(PROFILE, LoadPlan(9, SECONDS, 5)) == simulation.predict(
        PROFILE, LoadPlan(9, SECONDS, 5)
    )
    assert simulation.predict(PROFILE, LoadPlan(9, SECONDS, 5)) != simulation.predict(
        PROFILE, LoadPlan(9, SECONDS, 6)
    )


def test_typists_who_keep_to_a_replica_find_their_prompts_there():
    few = replace(PROFILE, capacity=replace(BATCHES, slots=20))
    reused = [
        simulation.predict(few, LoadPlan(40, SECONDS), ReplicaSet(4, sticky=sticky))[
            "prompt_tokens_reused_share"
        ]
        for sticky in (True, False)
    ]
    assert reused[0] > 0.9 > reused[1]


def test_replicas_are_as_many_as_it_takes():
    goal = Goal(115.0)
    found = sizing.size(PROFILE, 300, goal, ReplicaSet())
    assert found["replicas"] == math.ceil(300 / found["users_per_replica"])
    assert found["limit"] == "time"
    # So many are served, twice as many are not.
    each = found["users_per_replica"]
    served, not_served = (
        simulation.predict(PROFILE, LoadPlan(2 * count, SECONDS), ReplicaSet(2))
        for count in (each, 2 * each + 1)
    )
    assert served["suggestion_ms"]["p95"] <= 115 * 1.05
    assert not_served["suggestion_ms"]["p95"] > 115


def test_no_number_of_replicas_makes_an_engine_quicker_than_it_is():
    assert sizing.size(PROFILE, 10, Goal(100.0), ReplicaSet())["replicas"] is None


def test_service_times_are_kept_in_a_file(tmp_path):
    path = tmp_path / "box.json"
    PROFILE.write(path)
    assert EngineProfile.read(path) == PROFILE


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "sessions": []}', '{"version": 99}'])
def test_a_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "box.json"
    path.write_text(text)
    with pytest.raises(MidfillError, match=r"box\.json"):
        EngineProfile.read(path)


def test_the_command_sizes_without_a_model(tmp_path):
    path = tmp_path / "box.json"
    PROFILE.write(path)
    base = ["bench", "load", "--simulate", "--service", str(path), "--target-ms", "108"]
    done = CliRunner().invoke(cli, [*base, "--users", "10000", "--json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["sizes"]
    assert found["replicas"] == math.ceil(10_000 / found["users_per_replica"])
    assert "users each" in CliRunner().invoke(cli, [*base, "--users", "2"]).output
    runs = json.loads(CliRunner().invoke(cli, [*base, "--users", "3,9", "--replicas", "3", "--json"]).stdout)
    assert [run["users"] for run in runs["runs"]] == [3, 9]


def test_simulating_needs_measurements():
    done = CliRunner().invoke(cli, ["bench", "load", "--simulate"])
    assert done.exit_code != 0
    assert "--service FILE" in done.output
