"""Load test: many virtual users against one engine: waiting times, requests, the point of saturation.

Each virtual user has its own pipeline (`backends.PipelineBackend`) and plays the sessions of a trace in its
own order, repeatedly, in real time; all share one engine. Keys come when they are due whatever the engine
does, and suggestions are typed through, not accepted, so the load does not depend on how well it is served
(an open-loop test). The delay of the keys is measured too, since a load generator that is too slow looks like
a slow engine.

`figures` evaluates measured and simulated runs alike. Runs on the event loop.
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
"""Different failures to report."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One run of a load test.

    Attributes:
        users: number of virtual users.
        seconds: duration.
        seed: seed of the users' start times and orders of sessions.
        warm_s: seconds at the start that are not counted, because all prompts are new to the engine then.
    """

    users: int
    seconds: float
    seed: int = 0
    warm_s: float = WARM_S

    def order(self, user: int, num_sessions: int) -> tuple[float, Iterator[int]]:
        """Return a user's start time in seconds, and the endless order of its sessions."""
        chance = random.Random(f"{self.seed} {user}")
        delay_s = chance.uniform(0.0, _SPREAD_S)

        def numbers() -> Iterator[int]:
            while True:
                shuffled = list(range(num_sessions))
                chance.shuffle(shuffled)
                yield from shuffled

        return delay_s, numbers()


@dataclass(slots=True)
class LoadRun:
    """The results of a run.

    Attributes:
        plan: the plan of the run.
        begun_s: `time.monotonic` at the start.
        requests: requests of all users.
        jobs: the engine's work for them.
        late_s: delay of each key in seconds.
        busy_share: share of a core that this process used.
    """

    plan: LoadPlan
    begun_s: float
    requests: list[SuggestionRequest] = field(default_factory=list)
    jobs: list[EngineJob] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    busy_share: float = 0.0


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """What all virtual users share: a started engine, its model's FIM template, settings, typing sessions."""

    engine: Engine
    family: tuple[str, Family]
    settings: Settings
    sessions: Sequence[TypingSession]

    def pipeline(self, *, prefetch: bool = True) -> PipelineBackend:
        """Return a pipeline for a virtual user."""
        return PipelineBackend(self.engine, self.family, self.settings, prefetch=prefetch)


@dataclass(frozen=True, slots=True)
class Goal:
    """The service level that a run has to reach, measured or simulated.

    Attributes:
        target_ms: maximum of the 95th percentile of the time to a suggestion.
        served: minimum share of suggestions shown in time, see `target.SERVED`.
    """

    target_ms: float
    served: float = SERVED

    def missed(self, found: dict[str, Any], alone: dict[str, Any]) -> Literal["time", "share shown"] | None:
        """Return the criterion that is missed, or None. `alone` are the figures of a single user."""
        late = found["suggestion_ms"]["p95"]
        if late is None or late > self.target_ms:
            return "time"
        shown, most = found["shown_before_next_key_share"], alone["shown_before_next_key_share"]
        return "share shown" if shown < self.served * most else None


async def play(
    setup: BenchSetup, plan: LoadPlan, report: Progress = lambda _message, _share: None
) -> LoadRun:
    """Let the virtual users of a plan type in real time."""
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
    # Let cancelled requests leave the engine.
    await asyncio.sleep(_BETWEEN_S)
    load_run.busy_share = (time.process_time() - cpu_s) / (time.monotonic() - load_run.begun_s)
    return load_run


async def _type(user: int, setup: BenchSetup, plan: LoadPlan, begun_s: float) -> BackendRun:
    """Play sessions as one virtual user; return the results."""
    run = BackendRun(f"user {user}")
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
    """Return the figures of a run, measured or simulated, as JSON.

    suggestion_ms: time from a request to its suggestion, of suggestions shown before the next key.
    model_ms: the same, of suggestions for which the model ran.
    awaited_ms: time to the model's answer if nobody had typed on: cancelled and failed requests count as
        longer than observed (Kaplan-Meier); null where too few requests waited that long.
    requests_per_s: requests of the users. engine_requests_per_s: requests to the engine. idle_per_s: requests
        to the engine for work ahead.
    prompt_tokens_reused_share: share of prompt tokens found in the cache, as far as the engine reports it.
    answers_per_s: requests for which the model ran and that were answered before the next key.
    failures: numbers of failed requests, by message.
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
    # Skip requests whose engine did not report prompt tokens, or has not begun.
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
    """Return `figures`, and whether the load generator kept up.

    late_ms: delay of the keys. generator_cores: share of a core that this process used. generator_kept_up:
    whether the figures are those of the engine, not of a generator that was too slow.
    """
    late = [late_s * 1000 for late_s in load_run.late_s]
    return figures(load_run.requests, load_run.jobs, load_run.begun_s, load_run.plan) | {
        "late_ms": percentiles(late, 50, 95, 99),
        "generator_cores": round(load_run.busy_share, 2),
        "generator_kept_up": (percentile(late, 95) or 0.0) <= _LATE_MS and load_run.busy_share <= _BUSY,
    }


def saturation(runs: Sequence[dict[str, Any]], goal: Goal) -> dict[str, Any]:
    """Return the first run that misses the goal, and why. Runs are ordered by their number of users.

    The first run is the reference, as that of a single user.
    """
    least = runs[0]
    for run in runs:
        missed = goal.missed(run, least)
        if missed == "time":
            p95 = run["suggestion_ms"]["p95"]
            found = "no suggestion came in time" if p95 is None else f"p95 is {p95:.0f} ms"
            return {"users": run["users"], "why": f"{found}; the limit is {goal.target_ms:.0f} ms"}
        if missed == "share shown":
            shown, most = (one["shown_before_next_key_share"] for one in (run, least))
            why = f"{shown:.1%} are shown before the next key, less than {goal.served:.0%} of {most:.1%}"
            return {"users": run["users"], "why": why}
    return {"users": None, "why": "not reached"}


_ROWS = (
    ("suggestion_ms", "time to suggestion, ms"),
    ("model_ms", "... where the model ran, ms"),
    ("awaited_ms", "... without cancellations, ms"),
    ("shown_before_next_key_share", "shown before the next key"),
    ("cancelled_share", "cancelled"),
    ("failed", "failed"),
    ("requests_per_s", "requests per second"),
    ("engine_requests_per_s", "... to the engine"),
    ("idle_per_s", "... to the engine, prefetching"),
    ("prompt_tokens_reused_share", "prompt tokens from the cache"),
    ("late_ms", "delay of the keys, ms"),
    ("generator_cores", "cores used by the generator"),
)


def table(result: dict[str, Any]) -> Any:
    """Return a rich table of the runs, each with its prediction if there is one."""
    from rich.table import Table

    runs = result["runs"]
    grid = Table(title="{model}: {seconds:g} s each".format(**result), title_justify="left", box=None)
    grid.add_column(no_wrap=True)
    columns = []
    for run in runs:
        columns.append((f"{run['users']} users", run))
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
    """Return the lines below the table."""
    lines = []
    if saturates := result.get("saturates"):
        at = f"at {saturates['users']} users: " if saturates["users"] else ""
        lines.append(f"saturation: {at}{saturates['why']}")
    for run in result["runs"]:
        for why, count in run.get("failures", {}).items():
            lines.append(f"{run['users']} users: {count} requests failed: {why}")
    slow = [run["users"] for run in result["runs"] if not run.get("generator_kept_up", True)]
    lines += [f"{users} users: {_TOO_SLOW}" for users in slow]
    for run in result["runs"]:
        if "ratios" in run:
            found = ", ".join(f"{name} {'-' if v is None else v}" for name, v in run["ratios"].items())
            lines.append(f"predicted / measured, {run['users']} users: {found}")
    return lines


_TOO_SLOW = (
    "the load generator was too slow (see the last rows), so these figures are not those of the engine; use "
    "several machines with fewer users each."
)


def compare(measured: dict[str, Any], predicted: dict[str, Any]) -> dict[str, float | None]:
    """Return the ratios of predicted to measured figures; 1.0 is a perfect prediction."""
    found: dict[str, float | None] = {}
    for name in ("suggestion_ms", "model_ms"):
        for percent in ("p50", "p95"):
            was, said = measured[name][percent], predicted[name][percent]
            found[f"{name.removesuffix('_ms')}_{percent}"] = round(said / was, 3) if was and said else None
    was, said = measured["shown_before_next_key_share"], predicted["shown_before_next_key_share"]
    found["shown_share"] = round(said / was, 3) if was and said else None
    return found
