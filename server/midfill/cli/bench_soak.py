"""`midfill bench soak`: a long session, to find leaks."""

from __future__ import annotations

import asyncio

import click

from midfill.cli.options import JSON, MODEL
from midfill.cli.terminal import show, with_progress

_NUM_OPERATIONS = 60_000
# Growth that is tolerated; with a model its libraries' caches are added.
_MB_SCRIPTED, _MB_MODEL = 10.0, 20.0


@click.command("soak")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop after this many minutes.")
@click.option(
    "--operations",
    type=click.IntRange(120),
    show_default=f"{_NUM_OPERATIONS} without --minutes",
    help="Stop after this many operations (keys and others).",
)
@click.option(
    "--max-growth-mb",
    type=click.FloatRange(0),
    show_default=f"{_MB_SCRIPTED:g} with --engine scripted, else {_MB_MODEL:g}",
    help="Maximum growth of memory after the first third, in MB.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Random seed: another one plays another session."
)
@click.option(
    "--engine",
    "engine_override",
    metavar="WHERE",
    help="Where the model runs, instead of the setting `engine`: local, shared, a URL, or scripted for no "
    "model.",
)
@MODEL
@JSON
def bench_soak(
    minutes: float | None,
    operations: int | None,
    max_growth_mb: float | None,
    seed: int,
    engine_override: str | None,
    model: str | None,
    as_json: bool,
) -> None:
    """Play a long session to the real server without pauses, and check that nothing leaks.

    A simulated user types, accepts, deletes, switches, opens and closes documents and changes settings. With
    both --minutes and --operations, the first limit to be reached ends the session. Exits with status 1 if
    memory, threads or file descriptors grew after the first third, if a request failed or was not answered,
    or if a document differs from what the user typed.

    \b
    Examples:
      midfill bench soak --engine scripted
      midfill bench soak --minutes 30
      midfill bench soak --operations 5000 --engine scripted --json
    """
    from midfill.bench.soak import SCRIPTED, SoakPlan, soak, table

    if max_growth_mb is None:
        max_growth_mb = _MB_SCRIPTED if engine_override == SCRIPTED else _MB_MODEL
    if minutes is None and operations is None:
        operations = _NUM_OPERATIONS
    plan = SoakPlan(operations, minutes, seed, max_growth_mb)
    options = {"model": model} if model is not None else {}
    result = with_progress(
        "loading the model", lambda report: asyncio.run(soak(plan, engine_override, options, report))
    )
    show(result, table, as_json=as_json)
    if result["wrong"]:
        raise click.exceptions.Exit(1)
