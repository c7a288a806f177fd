"""Many people who type, against one engine: how long they wait, what the engine is asked, where it saturates.

Each typist is a pipeline of its own (`contenders.InProcess`) and plays the episodes of a trace in an order of
its own, again and again, in real time; all share one engine. Keys come when they are due whatever the engine
does, and suggestions are typed through, not accepted: so the load that is offered does not depend on how
well it is served. How late the keys came is measured too, since a generator that is itself too slow
would be taken for a slow engine.

The figures (`figures`) are those of a simulation (`simulation`) just the same. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from midfill.bench.backends import EngineJob, PipelineBackend, SuggestionRequest
from midfill.bench.replay import BackendRun, Pace, SessionPlayer
from midfill.bench.replay_report import cell
from midfill.bench.target import SERVED
from midfill.bench.trace import TypingSession
from midfill.completion.reasons import Reason
from midfill.engine.api import Engine, Progress
from midfill.fim.templates import Family
from midfill.settings import Settings
from midfill.system.measure import kaplan_meier, percentile, percentiles, share

BY_MODEL = frozenset({"model", "joined"})
_NOT_ASKED = frozenset(
    {
        Reason.MID_WORD,
        Reason.LINE_TAIL,
        Reason.EMPTY_FILE,
        Reason.FILE_EXCLUDED,
        Reason.SECRET_IN_FILE,
        Reason.SECRET_SEARCH,
        Reason.FILE_TOO_LARGE,
    }
)
"""Reasons for which the model is not asked."""

WARM_S = 5.0
_SPREAD_S = 3.0
_BETWEEN_S = 0.5
_LATE_MS = 5.0
_BUSY = 0.8
_MOST_FAILURES = 5
"""Sentences about failures that are told."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a trace is played by many.

    Attributes:
        users: how many.
        seconds: how long.
        seed: who begins when, and with what.
        warm_s: of this, so much at the start is left out: everybody is new to the engine then.
    """

    users: int
    seconds: float
    seed: int = 0
    warm_s: float = WARM_S

    def order(self, user: int, num_sessions: int) -> tuple[float, Iterator[int]]:
        """Return when a typist begins (seconds), and with which episodes it goes on, without end."""
        chance = random.Random(f"{self.seed} {user}")  # noqa: S311 - not a secret
        delay_s = chance.uniform(0.0, _SPREAD_S)

        def numbers() -> Iterator[int]:
            while True:
                shuffled = list(range(num_sessions))
                chance.shuffle(shuffled)
                yield from shuffled

        return delay_s, numbers()


@dataclass(slots=True)
class LoadRun:
    """What became of a run.

    Attributes:
        begun_s: `time.monotonic` at the start.
        late_s: of each key; see `Session.late_s`.
        busy_share: of a core, that this process used.
    """

    plan: LoadPlan
    begun_s: float
    requests: list[SuggestionRequest] = field(default_factory=list)
    jobs: list[EngineJob] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    busy_share: float = 0.0


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """What all typists share: a started engine, the family of its model, settings, what is typed."""

    engine: Engine
    family: tuple[str, Family]
    settings: Settings
    sessions: Sequence[TypingSession]

    def pipeline(self, *, looks_ahead: bool = True) -> PipelineBackend:
        """Return one for a typist."""
        return PipelineBackend(self.engine, self.family, self.settings, looks_ahead=looks_ahead)


@dataclass(frozen=True, slots=True)
class Goal:
    """What is good enough, of what is measured and of what is simulated.

    Attributes:
        target_ms: the most for the 95th percentile of the time to suggestion.
        served: see `midfill.bench.target.SERVED`.
    """

    target_ms: float
    served: float = SERVED

    def missed(self, found: dict[str, Any], alone: dict[str, Any]) -> Literal["time", "share shown"] | None:
        """Return what is not good enough; None if all is. `alone`: the figures of one typist."""
        late = found["suggestion_ms"]["p95"]
        if late is None or late > self.target_ms:
            return "time"
        shown, most = found["shown_before_next_key_share"], alone["shown_before_next_key_share"]
        return "share shown" if shown < self.served * most else None


async def play(
    setup: BenchSetup, plan: LoadPlan, report: Progress = lambda _message, _share: None
) -> LoadRun:
    """Let the typists of a plan type, in real time."""
    load_run = LoadRun(plan, time.monotonic())
    cpu_s = time.process_time()
    virtual_users = [
        asyncio.ensure_future(_type(user, setup, plan, load_run.begun_s)) for user in range(plan.users)
    ]
    ticking = asyncio.ensure_future(_tick(load_run.begun_s, plan, report))
    try:
        runs = await asyncio.gather(*virtual_users)
    finally:
        for task in (*virtual_users, ticking):
            task.cancel()
    for run in runs:
        load_run.requests += run.requests
        load_run.jobs += run.jobs
        load_run.late_s += run.late_s
    # What was taken back at the end leaves the engine.
    await asyncio.sleep(_BETWEEN_S)
    load_run.busy_share = (time.process_time() - cpu_s) / (time.monotonic() - load_run.begun_s)
    return load_run


async def _type(user: int, setup: BenchSetup, plan: LoadPlan, begun_s: float) -> BackendRun:
    """Return one typist."""
    run = BackendRun(f"typist {user}")
    pipeline = setup.pipeline()
    delay_s, numbers = plan.order(user, len(setup.sessions))
    await asyncio.sleep(max(0.0, begun_s + delay_s - time.monotonic()))
    try:
        for number in numbers:
            if (left_s := begun_s + plan.seconds - time.monotonic()) <= 0:
                break
            pace = Pace(limit_s=run.seconds + left_s, accepts=False, looks_inside=False)
            await SessionPlayer(run, pipeline, setup.sessions[number], number, pace).run()
    finally:
        await pipeline.end()
    return run


async def _tick(begun_s: float, plan: LoadPlan, report: Progress) -> None:
    while True:
        report(f"{plan.users} typing", min(1.0, (time.monotonic() - begun_s) / plan.seconds))
        await asyncio.sleep(0.5)


def figures(
    requests: Sequence[SuggestionRequest], jobs: Sequence[EngineJob], begun_s: float, plan: LoadPlan
) -> dict[str, Any]:
    """Return what a run, measured or simulated, has come to; ready for JSON.

    suggestion_ms: from a request to its suggestion, of those that came before the next key.
    model_ms: of these, those for which the model had to be asked.
    awaited_ms: to what the model said, had nobody typed on: requests that were taken back, or failed, count
        as longer than they were (Kaplan-Meier); null where too few waited for so long.
    requests_per_s: of the typists. engine_requests_per_s: what came of them for the engine; idle_per_s:
        beside them, work ahead of its time.
    prompt_tokens_reused_share: of what the engine has told of; null where it tells nothing.
    answers_per_s: requests that the model had to be asked for, and that were answered before the next key.
    failures: how many requests failed, by what was said.
    """
    from_s, to_s = begun_s + plan.warm_s, begun_s + plan.seconds
    counted = [request for request in requests if from_s <= request.asked_s < to_s]
    shown = [request for request in counted if request.outcome == "shown"]
    by_model = [
        request for request in counted if request.outcome in {"shown", "empty"} and _asks_model(request)
    ]
    cut_short = [request for request in counted if request.outcome in {"cancelled", "late"}]
    failed = [request for request in counted if request.outcome == "failed"]
    failures = Counter(str(request.detail or request.reason or "no answer") for request in failed)
    seconds = max(plan.seconds - plan.warm_s, 1e-9)
    own = [job for job in jobs if job.submitted_s is not None and from_s <= job.submitted_s < to_s]
    work = [job for job in own if not job.idle]
    # A server that says nothing of it, or has not come to it, has computed nothing and found nothing.
    told = [job for job in work if (job.num_computed or 0) + (job.num_reused or 0) > 0]
    return {
        "users": plan.users,
        "seconds": round(seconds, 1),
        "requests": len(counted),
        "suggestion_ms": percentiles([request.waited_ms for request in shown], 50, 95, 99),
        "model_ms": percentiles([a.waited_ms for a in shown if a.source in BY_MODEL], 50, 95, 99),
        "awaited_ms": kaplan_meier(
            [request.waited_ms for request in by_model],
            [request.waited_ms for request in (*cut_short, *failed)],
            *(50, 95, 99),
        ),
        "shown_before_next_key_share": share(len(shown), len(counted)),
        "cancelled_share": share(len(cut_short), len(counted)),
        "failed": len(failed),
        "failures": dict(failures.most_common(_MOST_FAILURES)),
        "requests_per_s": round(len(counted) / seconds, 2),
        "engine_requests_per_s": round(len(work) / seconds, 2),
        "idle_per_s": round((len(own) - len(work)) / seconds, 2),
        "answers_per_s": round(len(by_model) / seconds, 3),
        "prompt_tokens_reused_share": share(
            sum(job.num_reused or 0 for job in told), sum(job.num_prompt or 0 for job in told)
        ),
        "samples": {
            "suggestion_ms": len(shown),
            "model_ms": sum(request.source in BY_MODEL for request in shown),
            "awaited_ms": len(by_model),
        },
    }


def _asks_model(request: SuggestionRequest) -> bool:
    if request.text:
        return request.source in BY_MODEL
    return request.reason not in _NOT_ASKED


def measured(load_run: LoadRun) -> dict[str, Any]:
    """Return `figures`, and whether the generator itself kept up.

    late_ms: how late the keys came. generator_cores: how much of a core this process used.
    generator_kept_up: whether what was measured is the engine's doing.
    """
    late = [late_s * 1000 for late_s in load_run.late_s]
    return figures(load_run.requests, load_run.jobs, load_run.begun_s, load_run.plan) | {
        "late_ms": percentiles(late, 50, 95, 99),
        "generator_cores": round(load_run.busy_share, 2),
        "generator_kept_up": (percentile(late, 95) or 0.0) <= _LATE_MS and load_run.busy_share <= _BUSY,
    }


def saturation(runs: Sequence[dict[str, Any]], goal: Goal) -> dict[str, Any]:
    """Return the first run that is too much, and why; runs in the order of their numbers of users.

    The first one stands for what one typist alone gets.
    """
    least = runs[0]
    for run in runs:
        missed = goal.missed(run, least)
        if missed == "time":
            p95 = run["suggestion_ms"]["p95"]
            found = "nothing came in time" if p95 is None else f"p95 is {p95:.0f} ms"
            return {"users": run["users"], "why": f"{found}, the limit is {goal.target_ms:.0f} ms"}
        if missed == "share shown":
            shown, most = (one["shown_before_next_key_share"] for one in (run, least))
            why = f"{shown:.1%} is shown before the next key, less than {goal.served:.0%} of {most:.1%}"
            return {"users": run["users"], "why": why}
    return {"users": None, "why": "not reached"}


_ROWS = (
    ("suggestion_ms", "time to suggestion, ms"),
    ("model_ms", "... where the model ran, ms"),
    ("awaited_ms", "... had nobody typed on, ms"),
    ("shown_before_next_key_share", "shown before the next key"),
    ("cancelled_share", "cancelled"),
    ("failed", "failed"),
    ("requests_per_s", "requests a second"),
    ("engine_requests_per_s", "... for the engine"),
    ("idle_per_s", "... ahead of their time"),
    ("prompt_tokens_reused_share", "prompt tokens found computed"),
    ("late_ms", "keys came late by, ms"),
    ("generator_cores", "cores used by the generator"),
)


def table(result: dict[str, Any]) -> Any:
    """Return the runs side by side, each with what was predicted for it if that is known: a rich table."""
    from rich.table import Table  # noqa: PLC0415 - only a person needs it

    runs = result["runs"]
    grid = Table(title="{model}: {seconds:g} s each".format(**result), title_justify="left", box=None)
    grid.add_column(no_wrap=True)
    columns = []
    for run in runs:
        columns.append((f"{run['users']} typing", run))
        if "predicted" in run:
            columns.append(("predicted", run["predicted"]))
    for name, _ in columns:
        grid.add_column(name, no_wrap=True)
    for key, label in _ROWS:
        if any(key in run for _, run in columns):
            grid.add_row(label, *(cell(key, run.get(key)) for _, run in columns))
    grid.caption = "\n".join(_remarks(result))
    grid.caption_justify = "left"
    return grid


def _remarks(result: dict[str, Any]) -> list[str]:
    """Return what stands below the table."""
    lines = []
    if saturates := result.get("saturates"):
        at = f"{saturates['users']} typists, " if saturates["users"] else ""
        lines.append(f"saturates: {at}{saturates['why']}")
    for run in result["runs"]:
        for why, count in run.get("failures", {}).items():
            lines.append(f"{run['users']} typists: {count} failed: {why}")
    slow = [run["users"] for run in result["runs"] if not run.get("generator_kept_up", True)]
    lines += [f"{users} typists: {_TOO_SLOW}" for users in slow]
    for run in result["runs"]:
        if "ratios" in run:
            found = ", ".join(f"{name} {'-' if v is None else v}" for name, v in run["ratios"].items())
            lines.append(f"predicted / measured, {run['users']} typists: {found}")
    return lines


_TOO_SLOW = (
    "the generator itself did not keep up (see the last rows), so these figures are not the engine's alone; "
    "let several machines play fewer typists each."
)


def compare(measured: dict[str, Any], predicted: dict[str, Any]) -> dict[str, float | None]:
    """Predicted by measured: 1.0 is right."""
    found: dict[str, float | None] = {}
    for name in ("suggestion_ms", "model_ms"):
        for percent in ("p50", "p95"):
            was, said = measured[name][percent], predicted[name][percent]
            found[f"{name.removesuffix('_ms')}_{percent}"] = round(said / was, 3) if was and said else None
    was, said = measured["shown_before_next_key_share"], predicted["shown_before_next_key_share"]
    found["shown_share"] = round(said / was, 3) if was and said else None
    return found
