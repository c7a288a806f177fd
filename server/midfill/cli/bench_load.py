"""`midfill bench load`: many users typing at once, against one engine or in a simulation of many."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.bench.target import SERVED
from midfill.cli.bench import read_sessions, typing_options
from midfill.cli.engine_choice import engine_factory, read_settings
from midfill.cli.options import ENGINE, JSON, MODEL
from midfill.cli.terminal import show, with_progress
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.bench.engine_profile import EngineProfile
    from midfill.bench.load import LoadPlan
    from midfill.bench.trace import TypingSession
    from midfill.engine.api import Progress
    from midfill.settings import Settings

_MAX_USERS = 100_000
_FILE = click.Path(path_type=Path)


class _Counts(click.ParamType[tuple[int, ...]]):
    """A list of positive numbers such as `1,2,4,8`, converted to a sorted tuple without repeats."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and 0 < int(part) <= _MAX_USERS for part in parts):
            self.fail(
                f"{value!r} is not a list of numbers from 1 to {_MAX_USERS}, such as 1,2,4,8.", param, ctx
            )
        return tuple(sorted({int(part) for part in parts}))


@dataclass(frozen=True, slots=True)
class _Run:
    """The measurements to make: one run for each plan."""

    settings: Settings
    engine_override: str | None
    sessions: list[TypingSession]
    plans: list[LoadPlan]
    save: Path | None
    known: EngineProfile | None

    async def measure(self, report: Progress) -> dict[str, Any]:
        """Return the runs, each with its prediction if the engine's service times are known."""
        from midfill.bench import load, simulation
        from midfill.bench.engine_profile import profile_engine
        from midfill.fim.probing import identify

        engine = await asyncio.to_thread(engine_factory(self.engine_override), self.settings)
        try:
            await engine.start(report)
            family = await identify(engine, self.settings.family)
            setup = load.BenchSetup(engine, family, self.settings, self.sessions)
            known = self.known
            if self.save is not None:
                known = await profile_engine(setup, report)
                known.write(self.save)
            runs = []
            for plan in self.plans:
                run = load.measured(await load.play(setup, plan, report))
                if known is not None:
                    predicted = simulation.predict(known, plan)
                    run |= {"predicted": predicted, "ratios": load.compare(run, predicted)}
                runs.append(run)
            return {"model": engine.model.name, "runs": runs}
        finally:
            await engine.close()


@click.command("load")
@click.option(
    "--users",
    type=_Counts(),
    default="1,2,4,8",
    show_default=True,
    help="Numbers of concurrent users: one run for each.",
)
@click.option("--trace", type=_FILE, help="File of recorded typing (.jsonl or .jsonl.gz).")
@typing_options
@click.option(
    "--duration",
    type=click.FloatRange(6),
    default=30.0,
    show_default=True,
    help="Length of each run in seconds.",
)
@click.option(
    "--target-ms",
    type=click.FloatRange(1),
    default=250.0,
    show_default=True,
    help="Target for the 95th percentile of the time to a suggestion, in milliseconds.",
)
@click.option(
    "--save-service",
    "save",
    type=_FILE,
    help="First measure the engine's service times, and save them to this file.",
)
@click.option("--service", type=_FILE, help="Read the service times that --save-service wrote.")
@click.option(
    "--simulate",
    is_flag=True,
    help="Use no model: compute from --service how many replicas are needed.",
)
@click.option(
    "--replicas", type=click.IntRange(1), help="With --simulate: predict the result for this many replicas."
)
@click.option(
    "--served",
    type=click.FloatRange(0, 1),
    default=SERVED,
    show_default=True,
    help="Target for the share of suggestions shown before the next key, relative to the first run.",
)
@click.option(
    "--router",
    type=click.Choice(["sticky", "least-loaded"]),
    default="sticky",
    show_default=True,
    help="With --simulate: send each user to the replica with their KV cache, or to the least loaded one.",
)
@MODEL
@JSON
@ENGINE
def bench_load(
    users: tuple[int, ...],
    trace: Path | None,
    files: Path | None,
    num_sessions: int | None,
    seed: int,
    duration: float,
    target_ms: float,
    save: Path | None,
    service: Path | None,
    simulate: bool,
    replicas: int | None,
    served: float,
    router: str,
    model: str | None,
    as_json: bool,
    engine_override: str | None,
) -> None:
    """Let simulated users type concurrently against one engine, and report the saturation point.

    Each user has a completion pipeline, as in an editor, and plays the typing in a loop. Suggestions are
    typed through. The first 5 seconds of a run are not counted. Nobody else should use the engine meanwhile.
    `engine_fallback` is ignored: a failed request counts as failed.

    With --save-service, service times are measured first, and each run is compared with its prediction.
    --simulate needs only that file: for each number of users it computes how many replicas keep the 95th
    percentile below --target-ms, or predicts the result for --replicas.

    \b
    Examples:
      midfill bench load --trace typing.jsonl.gz --users 1,2,4,8,16 --engine http://gpu-box:8000
      midfill bench load --files src --users 8,32 --engine shared --save-service box.json
      midfill bench load --simulate --service box.json --users 100,1000,10000
    """
    if simulate:
        if service is None:
            raise click.UsageError(
                "--simulate needs --service FILE, which a run with --save-service FILE writes."
            )
        question = _Question(users, seed, duration, (target_ms, served), replicas, router == "sticky")
        _simulate(service, question, as_json=as_json)
        return
    from midfill.bench import load
    from midfill.bench.engine_profile import EngineProfile

    # The fallback would be measured in place of the engine.
    settings = read_settings(model=model, engine_fallback=False)
    sessions = read_sessions(trace, files, seed, num_sessions)
    known = None if service is None else EngineProfile.read(service)
    if known is not None and [len(one.keys) for one in known.sessions] != [len(one.keys) for one in sessions]:
        raise MidfillError(f"{service} was measured with other typing. Give the same --trace and --sessions.")
    plans = [load.LoadPlan(count, duration, seed) for count in users]
    run = _Run(settings, engine_override, sessions, plans, save, known)
    found = with_progress("loading the model", lambda report: asyncio.run(run.measure(report)))
    what = {"trace": str(trace or files), "engine": engine_override or settings.engine, "seed": seed}
    result = what | {"seconds": duration, "target_ms": target_ms, "served": served} | found
    saturates = load.saturation(result["runs"], load.Goal(target_ms, served))
    show(result | {"saturates": saturates}, load.table, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Question:
    """What to compute for each number of users: the replicas they need, or the result for `replicas`."""

    users: tuple[int, ...]
    seed: int
    seconds: float
    goal: tuple[float, float]
    replicas: int | None
    sticky: bool

    def answer(self, service: EngineProfile, report: Progress) -> dict[str, Any]:
        """Return the number of replicas, or the prediction for the given number of them."""
        from midfill.bench import load, simulation, sizing

        replica_set = simulation.ReplicaSet(self.replicas or 1, sticky=self.sticky)
        what = {"model": service.engine, "where": service.where, "simulated": True, "seed": self.seed}
        goal = load.Goal(*self.goal)
        what |= {"target_ms": goal.target_ms, "served": goal.served}
        what |= {"router": "sticky" if self.sticky else "least-loaded"}
        found: list[dict[str, Any]] = []
        for number, users in enumerate(self.users):
            report(f"simulating {users} users", number / len(self.users))
            if self.replicas is None:
                found.append(sizing.size(service, users, goal, replica_set, self.seed))
            else:
                found.append(
                    simulation.predict(service, load.LoadPlan(users, self.seconds, self.seed), replica_set)
                )
        if self.replicas is None:
            return what | {"sizes": found}
        return what | {"replicas": self.replicas, "seconds": self.seconds, "runs": found}


def _simulate(path: Path, question: _Question, *, as_json: bool) -> None:
    from midfill.bench import load, sizing
    from midfill.bench.engine_profile import EngineProfile

    service = EngineProfile.read(path)
    found = with_progress("simulating", lambda report: question.answer(service, report))
    show(found, load.table if question.replicas else sizing.table, as_json=as_json)
