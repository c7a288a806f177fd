"""`midfill adapter plan`: a dry run of training: data, time, memory, and the power of the evaluation.

Runs no model: the time of a token is estimated from a matrix product, and holds for an idle machine.
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
from midfill.training.job import Limits
from midfill.training.selection import Selection

_GAINS = (0.02, 0.05, 0.10, 0.20)
_PROBE_ROWS, _PROBE_WIDTH = 384, 1024
_STEP_EXAMPLES = 8
# How much longer a step took with an int8 base; measured with the default model (docs/experiments).
_INT8_RATIO = 1.22
_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Speed:
    """Estimated speed of this machine.

    Attributes:
        forward_s: seconds per token of a forward pass (evaluation).
        step_s: seconds per token of a training step.
    """

    forward_s: float
    step_s: float


def estimate_speed(model: Path, base_weights: str | None = None) -> Speed:
    """Estimate the speed from a matrix product: a forward pass is two operations per weight and token.

    The backward pass takes the same again; head, attention and LoRA add half of that on a small model. With
    an int8 base a part is computed twice (activation checkpointing).
    """
    left = np.ones((_PROBE_ROWS, _PROBE_WIDTH), dtype=np.float32)
    right = np.ones((_PROBE_WIDTH, _PROBE_WIDTH), dtype=np.float32)
    seconds = []
    for _ in range(8):
        begun_s = time.perf_counter()
        _ = left @ right
        seconds.append(time.perf_counter() - begun_s)
    # The fastest run: the others may have waited for other programs.
    per_weight = min(seconds) / (_PROBE_ROWS * _PROBE_WIDTH**2)
    weights = sum(outputs * inputs for outputs, inputs in layers_of(model).values())
    step = 4.0 * (_INT8_RATIO if base_weights == "int8" else 1.0)
    return Speed(1.5 * weights * per_weight, step * weights * per_weight)


def summarise(
    selection: Selection,
    examples: Examples,
    speed: Speed,
    budget_s: float,
    settings: Mapping[str, Any],
    memory: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the plan as `--json` prints it."""
    parts = {"train": examples.train, "dev": examples.dev, "test": examples.test}
    commits = len({example.commit for example in examples.test})
    tokens = [len(example.prompt) + len(example.target) for example in examples.train]
    mean = sum(tokens) / max(1, len(tokens))
    evaluation_s = speed.forward_s * mean * (4 * len(examples.dev) + 2 * len(examples.test) + 64)
    training_s = max(budget_s / 2, budget_s - evaluation_s)
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
            "evaluation_s": round(evaluation_s),
            "examples_learnt": min(affordable, 3 * len(examples.train)),
            "steps": min(affordable, 3 * len(examples.train)) // _STEP_EXAMPLES,
        },
        "memory": dict(memory),
        "evaluation": {
            "alpha": ALPHA,
            "spread": TYPICAL_SPREAD,
            "enough": commits >= _LIMITS.commits and len(examples.test) >= _LIMITS.examples,
            "needed": {"commits": _LIMITS.commits, "examples": _LIMITS.examples},
            "smallest_gain": round(smallest_gain(commits), 4) if commits > 1 else None,
            "power": {
                str(count): {f"{gain:.2f}": round(power(gain, TYPICAL_SPREAD, count), 3) for gain in _GAINS}
                for count in sorted({_LIMITS.commits, 40, 80, commits} - {0, 1})
            },
        },
        "digest": examples.digest,
    }


def describe(plan: Mapping[str, Any]) -> str:
    """Return the plan as text."""
    files, commits, evaluation, eta = plan["files"], plan["commits"], plan["evaluation"], plan["eta"]
    rows = [
        f"{plan['repository']} at {plan['head'][:12]}",
        f"files     {files['kept']} kept{_but(files['dropped'])}",
        f"commits   {commits['train']} train, {commits['dev']} dev, {commits['test']} test"
        + _but(commits["dropped"]),
        f"hunks     skipped: {_listed(plan['hunks_dropped']) or 'none'}",
        "examples  " + ", ".join(f"{count} {name}" for name, count in plan["examples"].items()),
        f"kinds     {_listed(plan['kinds']['train'])}",
        f"tokens    {plan['tokens_per_example']} per example, layout {plan['layout']}",
        f"time      {eta['budget_s'] / 60:.0f} min: about {eta['examples_learnt']} examples "
        f"({eta['steps']} steps), of which evaluation takes about {max(1, eta['evaluation_s'] // 60)} min; "
        "on an idle machine",
        _memory(plan["memory"]),
        "",
        "Power of the evaluation: how often a gain (in nats per token) is recognised as significant",
        f"{'test commits':>14}" + "".join(f"{gain:>8}" for gain in next(iter(evaluation["power"].values()))),
    ]
    for count, chances in evaluation["power"].items():
        here = "  here" if int(count) == commits["test"] else ""
        rows.append(f"{count:>14}" + "".join(f"{chance:8.0%}" for chance in chances.values()) + here)
    if evaluation["smallest_gain"] is not None:
        rows.append(
            f"Smallest gain that is recognised in four of five cases: {evaluation['smallest_gain']:.3f}"
        )
    if not evaluation["enough"]:
        rows.append(
            f"Too little data for the verdict `enabled`, which needs {evaluation['needed']['commits']} test "
            f"commits and {evaluation['needed']['examples']} examples."
        )
    return "\n".join(rows)


def _memory(memory: Mapping[str, Any]) -> str:
    needs = ", ".join(f"{need / 1000:.1f} GB in {form}" for form, need in memory["needed_mb"].items())
    form, free = memory["base_weights"], f"{memory['free_mb'] / 1000:.1f} GB are free"
    if form is None:
        verdict = "not enough for either" if len(memory["needed_mb"]) > 1 else "not enough"
    elif form in memory["fits"]:
        verdict = f"the base model would be held in {form}"
    else:
        verdict = f"not enough for {form}"
    return f"memory    about {needs} on {memory.get('device', 'a CPU')}; {free}: {verdict}"


def _but(dropped: Mapping[str, int]) -> str:
    return f"; skipped: {_listed(dropped)}" if dropped else ""


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
