"""`midfill adapter plan`, `train`, `eval`, `stats`: adapters from a repository's history."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.adapter import adapter
from midfill.cli.shared import JSON, MODEL, read_settings, show, with_progress
from midfill.cli.terminal import say
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.models.store import LocalModel

_UNITS = {"": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType[float]):
    """A time such as 90s, 20m or 1h; a bare number is minutes. In seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See the class."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no time. Write 90s, 20m or 1h.", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


_REPO = click.option(
    "--repo",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="the current folder",
    help="The git repository.",
)
_BUDGET = click.option(
    "--budget", type=Duration(), default="20m", show_default=True, help="Time for training and judging."
)


_BASE_WEIGHTS = click.option(
    "--base-weights",
    type=click.Choice(("auto", "float32", "int8")),
    default="auto",
    show_default="what fits into free memory",
    help="How the base model is held on a CPU. With int8 learning takes half the memory, and a "
    "quarter more time.",
)


@adapter.command("plan")
@_REPO
@_BUDGET
@_BASE_WEIGHTS
@MODEL
@JSON
def adapter_plan(repo: Path, budget: float, base_weights: str, model: str | None, as_json: bool) -> None:
    """Show what `midfill adapter train` would learn, and what its judgement could see. Changes nothing.

    Files and commits that are left out are counted by reason. Nothing of a repository is run.

    \b
    Examples:
      midfill adapter plan
      midfill adapter plan --repo ~/src/project --budget 1h --json
    """
    import psutil

    from midfill.training import data, memory, plan
    from midfill.training.history import Repository
    from midfill.training.selection import select

    settings = read_settings(model=model)
    base = _base(settings.model)

    def work(report: Any) -> dict[str, Any]:
        report("reading the history", None)
        repository = Repository(repo)
        selection = select(repository, settings)
        report("cutting examples", None)
        examples = data.build_examples(repository, selection, base, settings)
        free = psutil.virtual_memory().available
        room = memory.estimate(base.path, base_weights, settings, free)
        speed = plan.estimate_speed(base.path, room["base_weights"])
        return plan.summarise(selection, examples, speed, budget, _shown(settings), room)

    show(with_progress("planning", work), plan.describe, as_json=as_json)


_NAME = click.option("--name", metavar="NAME", help="The adapter's name; by default the repository's.")
_FORCE = click.option(
    "--force", is_flag=True, help="Use it whatever the verdict; that is recorded and shown."
)
_THREADS = click.option(
    "--threads", type=click.IntRange(0), default=0, show_default="all cores but one", help="CPU threads."
)


@adapter.command("train")
@_REPO
@_BUDGET
@_NAME
@click.option("--resume", is_flag=True, help="Go on from where a stopped training was.")
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Train with so many processes: one for each GPU.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Make so many steps, however long they take: the same steps with the same --base-weights make the "
    "same adapter.",
)
@click.option(
    "--job",
    "job_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the job into this file, for torchrun, and do nothing else.",
)
@_THREADS
@_BASE_WEIGHTS
@_FORCE
@MODEL
@JSON
def adapter_train(
    repo: Path,
    budget: float,
    name: str | None,
    resume: bool,
    processes: int,
    steps: int | None,
    job_file: Path | None,
    threads: int,
    base_weights: str,
    force: bool,
    model: str | None,
    as_json: bool,
) -> None:
    """Learn an adapter from a repository's history, and prove it on later commits.

    It learns from the commits before the newest ones, with the prompts that the server sends. The newest
    commits then judge it. Only an adapter that is better there, beyond chance, is registered as enabled; any
    other one is registered too, and stays off. All of it happens on this machine, at the lowest priority,
    and stands aside while you are being answered. Ctrl-C keeps a checkpoint; --resume goes on exactly there.

    With several GPUs the examples of a step are divided among the processes, which meet on this machine only.
    They learn what one process learns in the same steps. Torch's own launcher does as well: see --job.

    \b
    Examples:
      midfill adapter plan
      midfill adapter train --budget 30m
      midfill adapter train --repo ~/src/project --name project --resume
      midfill adapter train --base-weights int8
      midfill adapter train --processes 2 --json
      midfill adapter train --job job.json
      torchrun --nproc-per-node 2 -m midfill.training.worker job.json
    """
    import json

    from midfill.training.job import Job, most_threads, name_for, request_of

    settings = read_settings(model=model)
    job = Job(
        repo.resolve(),
        name or name_for(repo),
        budget,
        resume=resume,
        force=force,
        num_threads=threads or most_threads(),
        max_steps=steps,
        base_weights=base_weights,
    )
    if job_file is not None:
        from midfill.system import text_files

        request = request_of("train", job, _base(settings.model), settings)
        text_files.replace(job_file, json.dumps(request), private=True)
        return
    result = _run("train", job, settings, processes=processes)
    show(result, _describe, as_json=as_json)


@adapter.command("eval")
@click.argument("name", metavar="NAME|DIR")
@_REPO
@_THREADS
@_BASE_WEIGHTS
@_FORCE
@MODEL
@JSON
def adapter_eval(
    name: str, repo: Path, threads: int, base_weights: str, force: bool, model: str | None, as_json: bool
) -> None:
    """Judge an adapter on the newest commits of a repository, beside its base model.

    "enabled" means better beyond chance in every condition; "rejected" and "inconclusive" both mean off.
    A registered adapter takes the verdict. A folder in PEFT format can be judged without being registered.

    \b
    Examples:
      midfill adapter eval project
      midfill adapter eval ./their-adapter --repo ~/src/project --json
    """
    from midfill.adapters.registry import Registry
    from midfill.training.job import Job, most_threads, name_for

    settings = read_settings(model=model)
    registry = Registry()
    entry = registry.find(name)
    folder = entry.path if entry is not None else Path(name).expanduser().resolve()
    if entry is None and not folder.is_dir():
        registry.get(name)
    if force and entry is None:
        raise MidfillError("--force is recorded in the registry: import the adapter first.")
    label = entry.name if entry is not None else name_for(folder)
    job = Job(
        repo.resolve(),
        label,
        0.0,
        force=force,
        num_threads=threads or most_threads(),
        base_weights=base_weights,
    )
    fingerprint = entry.fingerprint if entry is not None else None
    result = _run("eval", job, settings, adapter=folder, fingerprint=fingerprint)
    if entry is not None:
        from midfill.training.verdict import judgement_of

        registry.set_judgement(entry.name, judgement_of(result, forced=force))
    show({"adapter": label, "forced": force, **result}, _describe, as_json=as_json)


@adapter.command("stats")
@JSON
def adapter_stats(as_json: bool) -> None:
    """Show how many suggestions were accepted with each adapter, and without one.

    Counted on this machine by running servers, without any text; see `midfill status`. With the setting
    `adapter_holdout` one session in ten, by chance, is without its adapter, and both groups are compared: the
    difference of the accepted shares, with its 95 % interval, in which it is sessions that count. Without
    it, sessions with and without an adapter differ in more than the adapter.

    \b
    Example:
      midfill adapter stats --json
    """
    from midfill.completion.stats import acceptance as feedback

    rows: list[dict[str, Any]] = []
    for key, languages in feedback.read(feedback.counts_path()).items():
        model, name = feedback.adapter_of(key)
        for language, counts in languages.items():
            share = counts.accepted / counts.offered if counts.offered else None
            rows.append(
                {
                    "model": model,
                    "adapter": name,
                    "language": language,
                    "offered": counts.offered,
                    "accepted": counts.accepted,
                    "accepted_share": None if share is None else round(share, 4),
                    "accepted_chars": counts.accepted_chars,
                }
            )
    rows.sort(key=lambda row: (row["model"], row["language"], row["adapter"] or ""))
    compared = _compare(feedback.read_sessions(feedback.counts_path()))
    show({"counts": rows, "holdout": compared}, _stats, as_json=as_json)


def _compare(sessions: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Sessions with each adapter beside those that it was held out of."""
    from midfill.completion.stats import acceptance as feedback
    from midfill.evaluation.statistics import difference

    groups: dict[str, dict[bool, list[tuple[int, int]]]] = {}
    for of_session in sessions.values():
        for key, counts in of_session.items():
            name, held_out = feedback.with_and_without(key)
            groups.setdefault(name, {True: [], False: []})[held_out].append((counts.accepted, counts.offered))
    rows: list[dict[str, Any]] = []
    for name, group in sorted(groups.items()):
        model, adapter = feedback.adapter_of(name)
        found = difference(group[False], group[True])
        row: dict[str, Any] = {"model": model, "adapter": adapter}
        for title, pairs in (("with", group[False]), ("without", group[True])):
            accepted, offered = (sum(column) for column in zip((0, 0), *pairs, strict=True))
            share = round(accepted / offered, 4) if offered else None
            row[title] = {"sessions": len(pairs), "offered": offered, "accepted": accepted, "share": share}
        row["difference"] = None if found is None else round(found[0], 4)
        row["interval"] = None if found is None else [round(found[1], 4), round(found[2], 4)]
        rows.append(row)
    return rows


def _stats(result: dict[str, Any]) -> Any:
    from rich.console import Group

    parts = [_counts(result)]
    for row in result["holdout"]:
        with_it, without = row["with"], row["without"]
        found = (
            f"\n{row['adapter']}: {with_it['sessions']} sessions with it, {without['sessions']} held out: "
        )
        if row["interval"] is None:
            parts.append(f"{found}too few to compare.")
            continue
        low, high = row["interval"]
        parts.append(
            f"{found}{with_it['share']:.1%} and {without['share']:.1%} accepted, difference "
            f"{row['difference']:+.1%} ({low:+.1%} to {high:+.1%})."
        )
    return Group(*parts)


def _counts(result: dict[str, Any]) -> Any:
    from rich.table import Table

    if not result["counts"]:
        return "No suggestion has been counted yet."
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("model", "language", "adapter", "offered", "accepted", "characters"):
        table.add_column(title, justify="right" if title in {"offered", "accepted", "characters"} else "left")
    for row in result["counts"]:
        share = "-" if row["accepted_share"] is None else f"{row['accepted_share']:.0%}"
        table.add_row(
            row["model"],
            row["language"],
            row["adapter"] or "none",
            str(row["offered"]),
            f"{row['accepted']} ({share})",
            str(row["accepted_chars"]),
        )
    return table


def _run(
    kind: str,
    job: Any,
    settings: Any,
    *,
    processes: int = 1,
    adapter: Path | None = None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Do a job in a process of its own, with a progress bar."""
    import contextlib
    import signal

    from midfill.training import process as training
    from midfill.training.job import request_of

    request = request_of(kind, job, _base(settings.model), settings, adapter, fingerprint)
    last: dict[str, Any] = {}

    def work(report: Any) -> None:
        with training.started(request, processes) as process:
            coming = training.events(process)
            while True:
                try:
                    event = next(coming, None)
                except KeyboardInterrupt:
                    report("stopping, with a checkpoint", None)
                    # The terminal has told both; whoever sent it to this process alone has not.
                    with contextlib.suppress(OSError):
                        process.send_signal(signal.SIGINT)
                    coming = training.events(process)
                    continue
                if event is None:
                    return
                last.clear()
                last.update(event)
                if "stage" in event:
                    report(f"{event['stage']}: {event['message']}", event["share"])

    with_progress(kind, work)
    if "stopped" in last:
        say(f"{last['stopped']} Go on with: midfill adapter train --resume --name {job.name}", err=True)
        raise click.Abort
    if "error" in last:
        raise MidfillError(last["error"])
    result: dict[str, Any] = last["result"]
    return result


def _describe(result: dict[str, Any]) -> str:
    """A verdict for a person."""
    colours = {"enabled": "green", "rejected": "red", "inconclusive": "yellow"}
    rows = [
        f"{result['adapter']}: {click.style(result['verdict'], fg=colours[result['verdict']], bold=True)}"
    ]
    rows += [f"  {reason}" for reason in result["reasons"]]
    if result["nll_gain"] is not None:
        interval = result["interval"]
        bounds = f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
        rows.append(
            f"log-loss  {result['nll_base']:.4f} to {result['nll_adapter']:.4f} nats per token, gain "
            f"{result['nll_gain']:+.4f}{bounds}; {result['examples']} places, {result['commits']} commits"
        )
        rows.append(f"          {result['nll_gain_at_ends']:+.4f} of the gain by knowing where to end")
    if saved := result["saved_chars"]:
        rows.append(f"saved     {saved['base']} to {saved['adapter']} characters at {saved['holes']} places")
    if result["general"] is not None:
        rows.append(f"other     log-loss {result['general'] - 1:+.1%} on other code")
    if result["latency"] is not None:
        rows.append(f"latency   {result['latency'] - 1:+.0%}")
    if training := result["training"]:
        rows.append(
            f"training  {training['steps']} steps, {training['seconds_per_step']:.1f} s each, "
            f"strength {result['scale']:g}; peak memory {result['peak_rss_mb']} MB"
        )
    rows.append(f"report    {result['report']}")
    if result["forced"]:
        rows.append("It is used in spite of the verdict, because of --force.")
    elif result["verdict"] != "enabled":
        rows.append("It stays off.")
    return "\n".join(rows)


def _base(name: str) -> LocalModel:
    from midfill.models import store

    found = store.find(name)
    if found is None:
        raise MidfillError(f"The model {name!r} is not on this machine. Run: midfill model pull {name}")
    return found


def _shown(settings: Any) -> dict[str, Any]:
    """The settings that a prompt depends on."""
    names = ("model", "prefix_tokens", "suffix_tokens", "context", "context_tokens", "layout", "healing")
    return {name: getattr(settings, name) for name in names}
