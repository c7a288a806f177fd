"""`midfill bench gpu`: all measurements of a GPU in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from midfill.bench.shapes import SHAPES
from midfill.cli.options import JSON
from midfill.cli.terminal import say


@click.command("gpu")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default="this folder",
    help="Folder for gpu.jsonl, to which each figure is added as soon as it is there.",
)
@click.option(
    "--budget-s",
    type=click.FloatRange(0, min_open=True),
    default=440.0,
    show_default=True,
    help="Seconds for all measurements. What there is no time for is named.",
)
@click.option(
    "--shapes",
    metavar="NAME,NAME,...",
    help=f"Model shapes to measure. [default: {', '.join(SHAPES)}]",
)
@JSON
def bench_gpu(out: Path, budget_s: float, shapes: str | None, as_json: bool) -> None:
    """Measure a CUDA GPU with models of known shapes: speed, memory, and whether its tokens are right.

    Random weights are made on the GPU: nothing is downloaded, and only the results are written to the disk.
    The smallest shape comes first. A measurement that fails does not end the others; exits with status 1 if
    one has failed.

    \b
    Examples:
      midfill bench gpu --out results
      midfill bench gpu --shapes qwen2.5-coder-0.5b,qwen2.5-coder-7b --budget-s 200 --json
    """
    from midfill.bench import gpu

    plan = gpu.GpuPlan(budget_s=budget_s)
    if shapes is not None:
        plan = gpu.GpuPlan(tuple(name.strip() for name in shapes.split(",")), budget_s)
    lines = gpu.bench_gpu(plan, out, lambda line: say(json.dumps(line) if as_json else _text(line)))
    if lines[-1]["failed"]:
        raise SystemExit(1)


def _text(line: dict[str, Any]) -> str:
    figures = (f"{key} {value}" for key, value in line.items() if key not in ("at_s", "what"))
    return f"{line['at_s']:6.1f} s  {line['what']}: {', '.join(figures)}"
