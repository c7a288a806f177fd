"""`midfill adapter plan`, `train`, `eval`, `stats`: train adapters on a repository's history."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.engine_choice import installed_model, read_settings
from midfill.cli.options import JSON, MODEL
from midfill.cli.terminal import say, show, with_progress
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from midfill.settings import Settings

_UNITS = {"": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType[float]):
    """A duration such as 90s, 20m or 1h, converted to seconds; a bare number is minutes."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the duration in seconds."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", str(value).strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is not a duration. Write, for example, 90s, 20m or 1h.", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


_REPO = click.option(
    "--repo",
    type=click.Path(path_type=Path),
    default=Path(),
    show_default="the current folder",
    help="Git repository.",
)
_BUDGET = click.option(
    "--budget",
    type=Duration(),
    default="20m",
    show_default=True,
    help="Time for training and evaluation together: 90s, 20m, 1h; a bare number is minutes.",
)

_BASE_WEIGHTS = click.option(
    "--base-weights",
    type=click.Choice(("auto", "float32", "int8")),
    default="auto",
    show_default="what fits into free memory",
    help="Format of the base model's weights on a CPU. int8 halves the memory of training and takes a "
    "quarter more time.",
)


@click.command("plan")
@_REPO
@_BUDGET
@_BASE_WEIGHTS
@MODEL
@JSON
def adapter_plan(repo: Path, budget: float, base_weights: str, model: str | None, as_json: bool) -> None:
    """Dry run: list the commits and files that would be used for training and evaluation.

    Also counts the files and commits that are left out, by reason. Changes nothing, and runs no code of the
    repository.

    \b
    Examples:
      midfill adapter plan
      midfill adapter plan --repo ~/src/project --budget 1h --json
    """
    import psutil

    from midfill.engine.torch.devices import find_gpus
    from midfill.training import data, memory, plan
    from midfill.training.history import Repository
    from midfill.training.selection import select

    settings = read_settings(model=model)
    base = installed_model(settings.model)

    def work(report: Any) -> dict[str, Any]:
        report("reading the history", None)
        repository = Repository(repo)
        selection = select(repository, settings)
        report("cutting examples", None)
        examples = data.build_examples(repository, selection, base, settings)
        _, room = memory.place(base.path, base_weights, settings, find_gpus(settings.device))
        if room is None:
            free = psutil.virtual_memory().available
            room = memory.estimate(base.path, base_weights, settings, free)
        speed = plan.estimate_speed(base.path, room["base_weights"])
        return plan.summarise(selection, examples, speed, budget, _prompt_settings(settings), room)

    show(with_progress("planning", work), plan.describe, as_json=as_json)


_NAME = click.option(
    "--name", metavar="NAME", help="Name of the adapter. [default: the name of the repository]"
)
_FORCE = click.option(
    "--force",
    is_flag=True,
    help="Enable the adapter whatever the verdict. The registry records that it was forced.",
)
_THREADS = click.option(
    "--threads",
    type=click.IntRange(0),
    default=0,
    show_default="all cores but one",
    help="Number of CPU threads.",
)


@click.command("train")
@_REPO
@_BUDGET
@_NAME
@click.option("--resume", is_flag=True, help="Continue a stopped training from its checkpoint.")
@click.option(
    "--processes",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Number of training processes: one for each GPU.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Train for this number of steps instead of the time of --budget. Equal --steps and --base-weights "
    "give an equal adapter.",
)
@click.option(
    "--job",
    "job_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Only write the job to this file, for torchrun.",
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
    """Train an adapter on a repository's history, and evaluate it on later commits.

    Training uses the older commits and the server's own prompts; the newest commits are held out for the
    evaluation. Only an adapter that is significantly better there is registered as enabled; any other is
    registered too, but stays off. Everything runs on this machine, at the lowest priority, and pauses while
    a server on this machine computes suggestions. Ctrl-C saves a checkpoint; --resume continues from it.

    With several GPUs, the examples of each step are divided among the processes, which connect on this
    machine only. The result is that of one process after the same steps. For torchrun, see --job.

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

        request = request_of("train", job, installed_model(settings.model), settings)
        text_files.replace(job_file, json.dumps(request), private=True)
        return
    result = _run("train", job, settings, processes=processes)
    show(result, _describe, as_json=as_json)


@click.command("eval")
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
    """Evaluate an adapter against its base model on the newest commits of a repository.

    The verdict is "enabled" only if the adapter is significantly better and passes every other check;
    "rejected" and "inconclusive" both mean off. The verdict of a registered adapter is stored. A folder in
    PEFT format can be evaluated without being registered.

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
        raise MidfillError(f"--force needs a registered adapter. First run: midfill adapter import {name}")
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
        from midfill.training.verdict import evaluation_of

        registry.set_evaluation(entry.name, evaluation_of(result, forced=force))
    show({"adapter": label, "forced": force, **result}, _describe, as_json=as_json)


@click.command("stats")
@JSON
def adapter_stats(as_json: bool) -> None:
    """Show how many suggestions were accepted with each adapter and without one.

    Running servers keep these counts on this machine, without any text; see `midfill status`. With the
    setting `adapter_holdout`, one random session in ten runs without its adapter. The two groups are then
    compared: the difference between their acceptance rates, with a 95 % interval over sessions. Without that
    setting the groups differ in more than the adapter.

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
    """Compare, for each adapter, the sessions with it to those that it was held out of."""
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
    """Run a job in a separate process, with a progress bar. Return its result. Raises `MidfillError`."""
    import contextlib
    import signal

    from midfill.training import process as training
    from midfill.training.job import request_of

    request = request_of(kind, job, installed_model(settings.model), settings, adapter, fingerprint)
    last: dict[str, Any] = {}

    def work(report: Any) -> None:
        with training.started(request, processes) as process:
            coming = training.events(process)
            while True:
                try:
                    event = next(coming, None)
                except KeyboardInterrupt:
                    report("stopping; saving a checkpoint", None)
                    # Ctrl-C in a terminal reaches both processes; a signal sent to this one does not.
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
        say(f"{last['stopped']} To continue: midfill adapter train --resume --name {job.name}", err=True)
        raise click.Abort
    if "error" in last:
        raise MidfillError(last["error"])
    result: dict[str, Any] = last["result"]
    return result


def _describe(result: dict[str, Any]) -> str:
    """Return the verdict and its figures as text."""
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
            f"{result['nll_gain']:+.4f}{bounds}; {result['examples']} examples, {result['commits']} commits"
        )
        rows.append(
            f"          {result['nll_gain_at_ends']:+.4f} of the gain comes from ending at the right place"
        )
    if saved := result["saved_chars"]:
        rows.append(f"saved     {saved['base']} to {saved['adapter']} characters at {saved['holes']} holes")
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
        rows.append("Enabled in spite of the verdict, because of --force.")
    elif result["verdict"] != "enabled":
        rows.append("The adapter stays off.")
    return "\n".join(rows)


def _prompt_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that a prompt depends on."""
    names = ("model", "prefix_tokens", "suffix_tokens", "context", "context_tokens", "layout", "healing")
    return {name: getattr(settings, name) for name in names}
