"""Plots of the evaluations, with matplotlib (an extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from midfill.completion.confidence import BUILT_IN, Calibration, confidence, line_prefixes
from midfill.errors import MidfillError
from midfill.evaluation.calibration import reliability
from midfill.evaluation.repository import Result, score
from midfill.system.file_errors import why_unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#4393c3", "#d6604d", "#1a9850", "#999999")


def infilling(summary: Mapping[str, Any], path: Path) -> None:
    """Draw bars by kind: shares that pass, are exact, or begin with the right line. Raises `MidfillError`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = [kind for kind in summary["exact"] if "," not in kind]
    names = ("pass@1", "exact", "line_0")
    for offset, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        places = [index + (offset - 1) * 0.27 for index in range(len(kinds))]
        bars = axes.bar(
            places, [summary[name][kind] or 0.0 for kind in kinds], 0.25, label=name, color=colour
        )
        axes.bar_label(bars, fmt="{:.0%}", fontsize=7)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title("midfill eval infilling: {model}, {tasks} tasks, {through}".format(**summary), fontsize=11)
    axes.legend(fontsize=8)
    _save(figure, path)


def repository(
    results: Sequence[Result], summary: Mapping[str, Any], path: Path, by: Calibration = BUILT_IN
) -> None:
    """Draw the quality by kind of hole, and the reliability of the confidence. Raises `MidfillError`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    kinds, reliable = figure.subplots(1, 2)
    figure.suptitle(
        "midfill eval repo: {model} on {repository}, {holes} holes".format(**summary), fontsize=11
    )
    names = ("shown", "precision", "exact")
    labels = [kind for kind in summary["shown"] if summary["shown"][kind] is not None]
    for offset, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        places = [index + (offset - 1) * 0.27 for index in range(len(labels))]
        heights = [summary[name].get(kind) or 0.0 for kind in labels]
        bars = kinds.bar(places, heights, 0.25, label=name, color=colour)
        kinds.bar_label(bars, fmt="{:.0%}", fontsize=7)
    kinds.set_xticks(range(len(labels)), labels, fontsize=8)
    kinds.set_ylim(0, 1.05)
    kinds.yaxis.set_major_formatter("{x:.0%}")
    kinds.set_title(f"at eagerness {summary['eagerness']}", fontsize=9)
    kinds.legend(fontsize=8)
    _reliability(reliable, results, by)
    _save(figure, path)


def _reliability(axes: Axes, results: Sequence[Result], by: Calibration) -> None:
    """Draw a reliability diagram: how often prefixes of suggestions are right, by their confidence."""
    judged = [
        (confidence(result.evidence, end, by), score(result.text[:end], result.truth).right)
        for result in results
        if result.tokens
        for end in line_prefixes(result.text)
    ]
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    axes.set_title(f"reliability, {len(judged)} prefixes of suggestions", fontsize=9)
    axes.set_xlabel("confidence")
    axes.set_ylabel("share that is right")
    for eagerness, threshold in by.thresholds.items():
        axes.axvline(threshold, color="#999999", linewidth=0.8, linestyle=":")
        axes.annotate(str(eagerness), (threshold, 0.98), fontsize=7, rotation=90, ha="right", va="top")
    if not judged:
        return
    bins = reliability(np.array([one for one, _ in judged]), np.array([float(right) for _, right in judged]))
    axes.plot(
        [one["predicted"] for one in bins], [one["right"] for one in bins], marker="o", color=_COLOURS[0]
    )


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise MidfillError(f"Cannot write the picture {path}: {why_unwritable(error)}.") from error
