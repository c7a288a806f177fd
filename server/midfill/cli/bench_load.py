"""`midfill bench load`: many people who type, against one engine or in a simulation of many."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.bench.target import SERVED
from midfill.cli.bench import bench, read_sessions, typing_options
from midfill.cli.shared import JSON, MODEL, SCRIPT, engine_maker, read_settings, show, with_progress
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
    """`1,2,4,8`: how many, in several runs."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """See `click.ParamType`."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and 0 < int(part) <= _MAX_USERS for part in parts):
            self.fail(f"{value!r} is not a list of numbers from 1 to {_MAX_USERS}, like 1,2,4,8.", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


@dataclass(frozen=True, slots=True)
class _Run:
    """What is to be measured."""

    settings: Settings
    script: str | None
    sessions: list[TypingSession]
    plans: list[LoadPlan]
    save: Path | None
    known: EngineProfile | None

    async def measure(self, report: Progress) -> dict[str, Any]:
        """The runs, each beside what is predicted where the engine's service times are known."""
        from midfill.bench import load, simulation
        from midfill.bench.engine_profile import profile_engine
        from midfill.fim.probing import identify

        engine = await asyncio.to_thread(engine_maker(self.script), self.settings)
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


@bench.command("load")
@click.option(
    "--users", type=_Counts(), default="1,2,4,8", show_default=True, help="How many type at once; a run each."
)
@click.option("--trace", type=_FILE, help="Recorded typing (.jsonl or .jsonl.gz).")
@typing_options
@click.option(
    "--duration", type=click.FloatRange(6), default=30.0, show_default=True, help="Seconds of each run."
)
@click.option(
    "--target-ms",
    type=click.FloatRange(1),
    default=250.0,
    show_default=True,
    help="The 95th percentile of the time to suggestion that is still good.",
)
@click.option(
    "--save-service", "save", type=_FILE, help="Measure first what the engine takes, and write it here."
)
@click.option("--service", type=_FILE, help="What --save-service wrote.")
@click.option(
    "--simulate", is_flag=True, help="Ask no model: compute from --service how many replicas it takes."
)
@click.option("--replicas", type=click.IntRange(1), help="With --simulate: what so many replicas give.")
@click.option(
    "--served",
    type=click.FloatRange(0, 1),
    default=SERVED,
    show_default=True,
    help="The least of the suggestions before the next key, by those that one alone (the first run) gets.",
)
@click.option(
    "--router",
    type=click.Choice(["sticky", "least-loaded"]),
    default="sticky",
    show_default=True,
    help="With --simulate: whether typists keep to the replica that has computed their prompt.",
)
@MODEL
@JSON
@SCRIPT
def bench_load(
    users: tuple[int, ...],
    trace: Path | None,
    files: Path | None,
    episodes: int | None,
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
    script: str | None,
) -> None:
    """Let many people type at once against one engine: what they wait, and how many are too many.

    Every typist has a pipeline as in an editor, and plays the recording over and over; all share the engine.
    Suggestions are typed through. The first 5 seconds of a run do not count. Let nobody else use the engine
    meanwhile. What an engine fails to answer has failed, whatever `engine_fallback` says.

    With --save-service the engine is measured request by request first, and every run stands beside what the
    simulation predicts for it. --simulate needs nothing but that file: for each number of typists it finds
    how many such engines keep the 95th percentile below --target-ms, or says what --replicas of them do.

    \b
    Examples:
      midfill bench load --trace typing.jsonl.gz --users 1,2,4,8,16 --engine http://gpu-box:8000
      midfill bench load --files src --users 8,32 --engine shared --save-service box.json
      midfill bench load --simulate --service box.json --users 100,1000,10000
    """
    if simulate:
        if service is None:
            raise click.UsageError("--simulate needs --service FILE, which a run with --save-service writes.")
        question = _Question(users, seed, duration, (target_ms, served), replicas, router == "sticky")
        _simulate(service, question, as_json=as_json)
        return
    from midfill.bench import load
    from midfill.bench.engine_profile import EngineProfile

    # What stands in for the engine is not the engine.
    settings = read_settings(model=model, engine_fallback=False)
    sessions = read_sessions(trace, files, seed, episodes)
    known = None if service is None else EngineProfile.read(service)
    if known is not None and [len(one.keys) for one in known.sessions] != [len(one.keys) for one in sessions]:
        raise MidfillError(f"{service} was measured with other typing; give the same --trace and --episodes.")
    plans = [load.LoadPlan(count, duration, seed) for count in users]
    run = _Run(settings, script, sessions, plans, save, known)
    found = with_progress("loading the model", lambda report: asyncio.run(run.measure(report)))
    what = {"trace": str(trace or files), "engine": script or settings.engine, "seed": seed}
    result = what | {"seconds": duration, "target_ms": target_ms, "served": served} | found
    saturates = load.saturation(result["runs"], load.Goal(target_ms, served))
    show(result | {"saturates": saturates}, load.table, as_json=as_json)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is to be computed, for each number of typists."""

    users: tuple[int, ...]
    seed: int
    seconds: float
    goal: tuple[float, float]
    replicas: int | None
    sticky: bool

    def answer(self, service: EngineProfile, report: Progress) -> dict[str, Any]:
        """The number of replicas, or what the given number of them does."""
        from midfill.bench import load, simulation, sizing

        replica_set = simulation.ReplicaSet(self.replicas or 1, sticky=self.sticky)
        what = {"model": service.engine, "where": service.where, "simulated": True, "seed": self.seed}
        goal = load.Goal(*self.goal)
        what |= {"target_ms": goal.target_ms, "served": goal.served}
        what |= {"router": "sticky" if self.sticky else "least-loaded"}
        found: list[dict[str, Any]] = []
        for number, users in enumerate(self.users):
            report(f"simulating {users} typists", number / len(self.users))
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
