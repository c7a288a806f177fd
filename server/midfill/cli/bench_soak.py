"""`midfill bench soak`: does the server stay as small as it was."""

from __future__ import annotations

import asyncio

import click

from midfill.cli.bench import bench
from midfill.cli.shared import JSON, MODEL, show, with_progress

_NUM_OPERATIONS = 60_000
# What a model's own libraries keep beside what we keep.
_MB_SCRIPTED, _MB_MODEL = 10.0, 20.0


@bench.command("soak")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="End after this time.")
@click.option(
    "--operations",
    type=click.IntRange(120),
    show_default=f"{_NUM_OPERATIONS} without --minutes",
    help="End after so many keys and other operations.",
)
@click.option(
    "--max-growth-mb",
    type=click.FloatRange(0),
    show_default=f"{_MB_SCRIPTED:g} with --engine scripted, else {_MB_MODEL:g}",
    help="By how much memory may grow after the first third.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed is another session.")
@click.option(
    "--engine",
    "script",
    metavar="WHERE",
    help="Who runs the model, instead of the setting `engine`: local, shared, a URL, or scripted for none.",
)
@MODEL
@JSON
def bench_soak(
    minutes: float | None,
    operations: int | None,
    max_growth_mb: float | None,
    seed: int,
    script: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Play a long session to the real server, in fast motion, and see that nothing grows.

    A made-up user types, accepts, deletes, switches, opens and closes documents and changes settings, without
    a pause. With --minutes and --operations it ends with what comes first. Ends with status 1 if memory,
    threads or descriptors grew after the first third, if a request was not answered or failed, or if a
    document is not what the user typed.

    \b
    Examples:
      midfill bench soak --engine scripted
      midfill bench soak --minutes 30
      midfill bench soak --operations 5000 --engine scripted --json
    """
    from midfill.bench.soak import SCRIPTED, SoakPlan, soak, table

    if max_growth_mb is None:
        max_growth_mb = _MB_SCRIPTED if script == SCRIPTED else _MB_MODEL
    if minutes is None and operations is None:
        operations = _NUM_OPERATIONS
    plan = SoakPlan(operations, minutes, seed, max_growth_mb)
    options = {"model": model} if model is not None else {}
    result = with_progress(
        "loading the model", lambda report: asyncio.run(soak(plan, script, options, report))
    )
    show(result, table, as_json=as_json)
    if result["wrong"]:
        raise click.exceptions.Exit(1)
