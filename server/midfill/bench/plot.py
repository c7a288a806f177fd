"""The picture of a replay: how long suggestions took, and what became of each request. By matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midfill.bench.contenders import FATES, Asked
from midfill.bench.replay import Session
from midfill.errors import MidfillError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = dict(zip(FATES, ("#1a9850", "#4393c3", "#999999", "#d6604d", "#f4a582", "#000000"), strict=True))
_FLOOR_MS = 0.1
_ALL = "all suggestions"
_BUDGETS_MS = (40, 85, 152)


def need_matplotlib() -> None:
    """Raise `MidfillError` if there is no matplotlib, before anything is measured."""
    try:
        import matplotlib  # noqa: F401, ICN001, PLC0415 - an extra
    except ImportError as error:
        raise MidfillError("--plot needs matplotlib. Run: pip install matplotlib") from error


def plot(sessions: Sequence[Session], title: str, path: Path) -> None:
    """Draw the latencies' distribution above the timeline of each contender. Raises `MidfillError`."""
    need_matplotlib()
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(11, 4 + 4 * len(sessions)), layout="constrained")
    above, *below = figure.subplots(1 + len(sessions), 1)
    figure.suptitle(title, fontsize=12)
    _distribution(above, sessions)
    for axes, session in zip(below, sessions, strict=True):
        _timeline(axes, session)
        # Contenders take turns: on one scale it can be seen when.
        axes.sharex(below[0])
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise MidfillError(f"Cannot write the picture {path}: {error}.") from error


def _distribution(axes: Axes, sessions: Sequence[Session]) -> None:
    """Cumulative shares, by contender and by where the suggestion came from."""
    series: dict[str, list[float]] = {}
    for session in sessions:
        for asked in session.requests:
            if asked.fate in {"accepted", "shown"}:
                waited_ms = max(asked.waited_ms, _FLOOR_MS)
                series.setdefault(f"{session.name}, {_ALL}", []).append(waited_ms)
                series.setdefault(f"{session.name}, {asked.source or '?'}", []).append(waited_ms)
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
    axes.set_xlabel("from the request to the suggestion, ms (above: share of the next keys that come later)")
    axes.set_ylabel("share of the suggestions")
    axes.grid(visible=True, alpha=0.2)
    longest = max((value for values in series.values() for value in values), default=0.0)
    # Room for the last label.
    axes.set_xlim(left=None, right=max(2 * _BUDGETS_MS[-1], 1.2 * longest))
    if series:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _timeline(axes: Axes, session: Session) -> None:
    requests: Sequence[Asked] = session.requests
    for fate in FATES:
        some = [asked for asked in requests if asked.fate == fate]
        if some:
            axes.scatter(
                [asked.asked_s - session.begun_s for asked in some],
                [max(asked.waited_ms, _FLOOR_MS) for asked in some],
                s=16,
                color=_COLOURS[fate],
                label=f"{fate} ({len(some)})",
                alpha=0.8,
                linewidths=0,
            )
    _milliseconds(axes, "y")
    axes.set_title(session.name, fontsize=10)
    axes.set_xlabel("time of the request, s")
    axes.set_ylabel("until the answer or the next key, ms")
    axes.grid(visible=True, alpha=0.2)
    if requests:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _milliseconds(axes: Axes, axis: str) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator  # noqa: PLC0415 - an extra

    (axes.set_xscale if axis == "x" else axes.set_yscale)("log", subs=())
    one: Any = axes.xaxis if axis == "x" else axes.yaxis
    one.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    one.set_major_formatter("{x:g}")
