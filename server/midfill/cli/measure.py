"""`midfill eval` and `midfill bench`: how good the suggestions are, and how fast."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from midfill.cli.shared import ADAPTER, JSON, MODEL, engine_maker, read_settings, with_progress

if TYPE_CHECKING:
    from midfill.engine import Progress
    from midfill.settings import Settings


@click.group()
def bench() -> None:
    """Measure midfill's own speed."""


@bench.command("lsp")
@click.option("--keys", type=click.IntRange(10), default=500, show_default=True, help="Keys to type.")
@click.option("--busy", is_flag=True, help="While a real model decodes in the same process.")
@MODEL
@JSON
def bench_lsp(keys: int, busy: bool, model: str | None, as_json: bool) -> None:
    """Type into the real server and measure what all but the model takes.

    A script takes the model's place; each key is timed from its change and request to the answer.

    """
    from midfill.bench import bench_lsp as measure

    result = asyncio.run(measure(keys, busy_model=read_settings(model=model).model if busy else None))
    rows = (f"{key:12} {value}" for key, value in result.items())
    click.echo(json.dumps(result) if as_json else "\n".join(rows))


@click.group("eval")
def evaluate() -> None:
    """Measure how good the suggestions are."""


@evaluate.command("infilling")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--raw", is_flag=True, help="The model alone: no anchoring, healing, stopping or clean-up.")
@click.option("--limit", type=click.IntRange(1), help="At most this many tasks, evenly from each kind.")
@click.option("--max-tokens", type=click.IntRange(1, 1024), help="Most tokens of a suggestion.")
@click.option("--results", type=click.Path(path_type=Path), help="Keep results here, and go on from them.")
@click.option(
    "--compare", type=click.Path(path_type=Path), help="Results of another run, to compare in pairs."
)
@MODEL
@ADAPTER
@JSON
def eval_infilling(
    file: Path,
    raw: bool,
    limit: int | None,
    max_tokens: int | None,
    results: Path | None,
    compare: Path | None,
    model: str | None,
    adapter: str | None,
    as_json: bool,
) -> None:
    """Fill the holes of FILE's tasks, run their tests, and print what share passes.

    FILE has a JSON object a line (.jsonl or .jsonl.gz), in the format of HumanEval-Infilling. The programs
    are run: use tasks that you trust.

    \b
    Examples:
      midfill eval infilling tasks.jsonl.gz --limit 40
      midfill eval infilling tasks.jsonl --results new.jsonl --compare old.jsonl --json
    """
    from midfill import evaluation

    tasks = evaluation.read_tasks(file)
    tasks = evaluation.sample(tasks, limit) if limit else tasks
    settings = read_settings(model=model, adapter=adapter, max_new_tokens=max_tokens)
    done = {result.id: result for result in evaluation.read_results(results)} if results else {}
    found = with_progress(
        "loading the model",
        lambda report: asyncio.run(_evaluate(settings, tasks, done, results, report, raw=raw)),
    )
    summary = evaluation.summarise(found)
    if compare is not None:
        earlier = {result.id: result for result in evaluation.read_results(compare)}
        summary["compared"] = evaluation.compare(found, earlier)
    if as_json:
        click.echo(json.dumps(summary))
        return
    for kind, share in summary["pass@1"].items():
        click.echo(f"{kind:24} pass@1 {share:6.1%}   exact {summary['exact'][kind]:6.1%}")
    click.echo(f"{summary['tasks']} tasks, p50 {summary['latency_ms']['p50']:.0f} ms")
    if compare is not None:
        compared = summary["compared"]
        click.echo("compared: {better} better, {worse} worse of {tasks}, p = {p}".format(**compared))


async def _evaluate(
    settings: Settings, tasks: Any, done: Any, results: Path | None, report: Progress, *, raw: bool
) -> Any:
    from midfill import evaluation

    engine = engine_maker(None)(settings)
    try:
        await engine.start(report)
        filler = evaluation.Filler(engine, settings, raw=raw)
        count = len(done)

        def keep(result: Any) -> None:
            nonlocal count
            count += 1
            report("filling holes", min(1.0, count / len(tasks)))
            if results is not None:
                evaluation.append_result(results, result)

        return await evaluation.evaluate(tasks, filler, done, keep)
    finally:
        await engine.close()
