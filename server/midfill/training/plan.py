"""`midfill adapter plan`: what would be learnt, how long it takes, what a judgement could see.

Runs no model: how long a token takes is guessed from a product of two matrices, and holds for an idle
machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from midfill.adapters.format import layers_of
from midfill.evaluation.statistics import ALPHA, TYPICAL_SPREAD, power, smallest_gain
from midfill.training.data import Examples, count_kinds
from midfill.training.selection import Selection

MIN_COMMITS = 20
MIN_EXAMPLES = 150
_GAINS = (0.02, 0.05, 0.10, 0.20)
_PROBE_ROWS, _PROBE_WIDTH = 384, 1024
_STEP_EXAMPLES = 8
# How much longer a step took with the default model; server/LOG.md.
_INT8_RATIO = 1.22


@dataclass(frozen=True, slots=True)
class Speed:
    """What computing costs here, roughly.

    Attributes:
        forward_s: for a token, to judge.
        step_s: for a token, to learn.
    """

    forward_s: float
    step_s: float


def estimate_speed(model: Path, base_weights: str | None = None) -> Speed:
    """From a product of two matrices: a forward pass is two operations for each weight and token.

    Backwards it is as many again; head, attention and the branches add half of that on a small model. With
    the base in int8 a part is computed twice.
    """
    left = np.ones((_PROBE_ROWS, _PROBE_WIDTH), dtype=np.float32)
    right = np.ones((_PROBE_WIDTH, _PROBE_WIDTH), dtype=np.float32)
    seconds = []
    for _ in range(8):
        begun_s = time.perf_counter()
        _ = left @ right
        seconds.append(time.perf_counter() - begun_s)
    # The quickest one: the others may have waited for other programs.
    per_weight = min(seconds) / (_PROBE_ROWS * _PROBE_WIDTH**2)
    weights = sum(outputs * inputs for outputs, inputs in layers_of(model).values())
    step = 4.0 * (_INT8_RATIO if base_weights == "int8" else 1.0)
    return Speed(1.5 * weights * per_weight, step * weights * per_weight)


def summarise(  # noqa: PLR0913, PLR0917 - what a plan is made of
    selection: Selection,
    examples: Examples,
    speed: Speed,
    budget_s: float,
    settings: Mapping[str, Any],
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """All of it, as `--json` prints it."""
    parts = {"train": examples.train, "dev": examples.dev, "test": examples.test}
    commits = len({example.commit for example in examples.test})
    tokens = [len(example.prompt) + len(example.target) for example in examples.train]
    mean = sum(tokens) / max(1, len(tokens))
    judging_s = speed.forward_s * mean * (4 * len(examples.dev) + 2 * len(examples.test) + 64)
    training_s = max(budget_s / 2, budget_s - judging_s)
    affordable = int(training_s / max(1e-9, speed.step_s * mean))
    return {
        "repository": selection.repository,
        "head": selection.head,
        "settings": dict(settings),
        "layout": examples.layout,
        "files": {"kept": len(selection.tree), "dropped": dict(selection.dropped_files)},
        "commits": {
            "train": sum(bool(one) for one in selection.split.train),
            "dev": len({example.commit for example in examples.dev}),
            "test": commits,
            "dropped": {key: count for key, count in selection.dropped_commits.items() if count},
        },
        "hunks_dropped": dict(selection.dropped_hunks),
        "examples": {name: len(part) for name, part in parts.items()},
        "kinds": {name: dict(count_kinds(part)) for name, part in parts.items()},
        "tokens_per_example": round(mean, 1),
        "eta": {
            "budget_s": round(budget_s),
            "judging_s": round(judging_s),
            "examples_learnt": min(affordable, 3 * len(examples.train)),
            "steps": min(affordable, 3 * len(examples.train)) // _STEP_EXAMPLES,
        },
        "memory": dict(memory),
        "judgement": {
            "alpha": ALPHA,
            "spread": TYPICAL_SPREAD,
            "enough": commits >= MIN_COMMITS and len(examples.test) >= MIN_EXAMPLES,
            "needed": {"commits": MIN_COMMITS, "examples": MIN_EXAMPLES},
            "smallest_gain": round(smallest_gain(commits), 4) if commits > 1 else None,
            "power": {
                str(count): {f"{gain:.2f}": round(power(gain, TYPICAL_SPREAD, count), 3) for gain in _GAINS}
                for count in sorted({MIN_COMMITS, 40, 80, commits} - {0, 1})
            },
        },
        "digest": examples.digest,
    }


def describe(plan: Mapping[str, Any]) -> str:
    """The plan for a person."""
    files, commits, judgement, eta = plan["files"], plan["commits"], plan["judgement"], plan["eta"]
    rows = [
        f"{plan['repository']} at {plan['head'][:12]}",
        f"files     {files['kept']} kept{_but(files['dropped'])}",
        f"commits   {commits['train']} to train, {commits['dev']} to choose, {commits['test']} to judge"
        + _but(commits["dropped"]),
        f"hunks     left out: {_listed(plan['hunks_dropped']) or 'none'}",
        "examples  " + ", ".join(f"{count} {name}" for name, count in plan["examples"].items()),
        f"kinds     {_listed(plan['kinds']['train'])}",
        f"tokens    {plan['tokens_per_example']} per example, layout {plan['layout']}",
        f"time      within {eta['budget_s'] / 60:.0f} min about {eta['examples_learnt']} examples "
        f"({eta['steps']} steps); judging takes about {max(1, eta['judging_s'] // 60)} min of it, "
        "on an idle machine",
        _memory(plan["memory"]),
        "",
        "What a judgement could see: how often a gain, in nats per token, is found to be one",
        f"{'test commits':>14}" + "".join(f"{gain:>8}" for gain in next(iter(judgement["power"].values()))),
    ]
    for count, chances in judgement["power"].items():
        here = "  here" if int(count) == commits["test"] else ""
        rows.append(f"{count:>14}" + "".join(f"{chance:8.0%}" for chance in chances.values()) + here)
    if judgement["smallest_gain"] is not None:
        rows.append(
            f"The smallest gain that is found in four of five cases: {judgement['smallest_gain']:.3f}"
        )
    if not judgement["enough"]:
        rows.append(
            f"Too little for a verdict of `enabled`: {judgement['needed']['commits']} test commits and "
            f"{judgement['needed']['examples']} examples are needed."
        )
    return "\n".join(rows)


def _memory(memory: Mapping[str, Any]) -> str:
    needs = ", ".join(f"{need / 1000:.1f} GB in {form}" for form, need in memory["needed_mb"].items())
    form, free = memory["base_weights"], f"{memory['free_mb'] / 1000:.1f} GB are free"
    if form is None:
        verdict = "too little for either"
    elif form in memory["fits"]:
        verdict = f"so the base would be held in {form}"
    else:
        verdict = f"too little for {form}"
    return f"memory    about {needs} on a CPU; {free}: {verdict}"


def _but(dropped: Mapping[str, int]) -> str:
    return f"; left out: {_listed(dropped)}" if dropped else ""


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
