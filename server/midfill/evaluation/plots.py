"""Pictures of the evaluations. By matplotlib, an extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midfill.errors import MidfillError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#4393c3", "#d6604d", "#1a9850", "#999999")


def infilling(summary: Mapping[str, Any], path: Path) -> None:
    """Bars by kind: what passes, what is exact, how similar. Raises `MidfillError`."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = list(summary["pass@1"])
    names = ("pass@1", "exact", "similarity")
    for offset, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        places = [index + (offset - 1) * 0.27 for index in range(len(kinds))]
        bars = axes.bar(places, [summary[name][kind] for kind in kinds], 0.25, label=name, color=colour)
        axes.bar_label(bars, fmt="{:.0%}", fontsize=7)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title("midfill eval infilling: {model}, {tasks} tasks, {through}".format(**summary), fontsize=11)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise MidfillError(f"Cannot write the picture {path}: {error}.") from error
