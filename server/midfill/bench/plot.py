"""Plot a replay with matplotlib: the latencies of suggestions, and the outcome of each request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midfill.bench.backends import OUTCOMES, SuggestionRequest
from midfill.bench.replay import BackendRun
from midfill.errors import MidfillError
from midfill.system.file_errors import why_unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = dict(
    zip(OUTCOMES, ("#1a9850", "#4393c3", "#999999", "#d6604d", "#f4a582", "#000000"), strict=True)
)
_FLOOR_MS = 0.1
_ALL = "all suggestions"
_BUDGETS_MS = (40, 85, 152)


def need_matplotlib() -> None:
    """Raise `MidfillError` if matplotlib is not installed, before anything is measured."""
    try:
        import matplotlib  # noqa: F401 - an extra
    except ImportError as error:
        raise MidfillError("--plot needs matplotlib. Run: pip install matplotlib") from error


def plot(runs: Sequence[BackendRun], title: str, path: Path) -> None:
    """Draw the distribution of the latencies, and a timeline of each backend. Raises `MidfillError`."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4 + 4 * len(runs)), layout="constrained")
    above, *below = figure.subplots(1 + len(runs), 1)
    figure.suptitle(title, fontsize=12)
    _distribution(above, runs)
    for axes, run in zip(below, runs, strict=True):
        _timeline(axes, run)
        # Backends take turns; a shared time axis shows when.
        axes.sharex(below[0])
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise MidfillError(f"Cannot write the picture {path}: {why_unwritable(error)}.") from error


def _distribution(axes: Axes, runs: Sequence[BackendRun]) -> None:
    """Draw cumulative shares by backend and by source of the suggestion."""
    series: dict[str, list[float]] = {}
    for run in runs:
        for request in run.requests:
            if request.outcome in {"accepted", "shown"}:
                waited_ms = max(request.waited_ms, _FLOOR_MS)
                series.setdefault(f"{run.name}, {_ALL}", []).append(waited_ms)
                series.setdefault(f"{run.name}, {request.source or '?'}", []).append(waited_ms)
    for name, values in series.items():
        style: dict[str, Any] = {"linewidth": 5, "alpha": 0.4} if name.endswith(_ALL) else {}
        axes.ecdf(values, label=f"{name} ({len(values)})", **style)
    for budget_ms, part in zip(_BUDGETS_MS, ("1/2", "1/4", "1/10"), strict=True):
        axes.axvline(budget_ms, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.annotate(
            part,
            (budget_ms, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            horizontalalignment="center",
            fontsize=7,
            color="#777777",
        )
    _milliseconds(axes, "x")
    axes.set_xlabel("time from request to suggestion, ms (top: share of next keys that come later)")
    axes.set_ylabel("share of the suggestions")
    axes.grid(visible=True, alpha=0.2)
    longest = max((value for values in series.values() for value in values), default=0.0)
    # Room for the last label.
    axes.set_xlim(left=None, right=max(2 * _BUDGETS_MS[-1], 1.2 * longest))
    if series:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _timeline(axes: Axes, run: BackendRun) -> None:
    requests: Sequence[SuggestionRequest] = run.requests
    for outcome in OUTCOMES:
        some = [request for request in requests if request.outcome == outcome]
        if some:
            axes.scatter(
                [request.asked_s - run.begun_s for request in some],
                [max(request.waited_ms, _FLOOR_MS) for request in some],
                s=16,
                color=_COLOURS[outcome],
                label=f"{outcome} ({len(some)})",
                alpha=0.8,
                linewidths=0,
            )
    _milliseconds(axes, "y")
    axes.set_title(run.name, fontsize=10)
    axes.set_xlabel("time of the request, s")
    axes.set_ylabel("time to the answer or the next key, ms")
    axes.grid(visible=True, alpha=0.2)
    if requests:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _milliseconds(axes: Axes, axis: str) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator

    (axes.set_xscale if axis == "x" else axes.set_yscale)("log", subs=())
    one: Any = axes.xaxis if axis == "x" else axes.yaxis
    one.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    one.set_major_formatter("{x:g}")
