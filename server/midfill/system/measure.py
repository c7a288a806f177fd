"""Percentiles and peak memory, for training, evaluation and benchmarks. Knows no servers and no models."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

_MB = 1_000_000
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, interpolated linearly; None if there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    index = (len(ordered) - 1) * percent / 100
    low, high = math.floor(index), math.ceil(index)
    return ordered[low] + (ordered[high] - ordered[low]) * (index - low)


def percentiles(values: Sequence[float], *percents: int) -> dict[str, float | None]:
    """Return `{"p50": ..., "p99": ...}`, rounded to a tenth."""
    found = ((percent, percentile(values, percent)) for percent in percents)
    return {f"p{percent}": None if value is None else round(value, 1) for percent, value in found}


def kaplan_meier(
    seen: Sequence[float], cut_short: Sequence[float], *percents: int
) -> dict[str, float | None]:
    """Return percentiles of waiting times, some of which were cut short (Kaplan-Meier estimator).

    Percentiles of `seen` alone are biased, since slow answers are more likely to be cut short.

    Args:
        seen: waiting times that were observed to their end.
        cut_short: times after which waiting ended without an answer (right-censored).
        percents: the percentiles.

    Returns:
        `{"p50": ...}`, rounded to a tenth; None where too few values were observed.
    """
    events = sorted([(value, True) for value in seen] + [(value, False) for value in cut_short])
    found: dict[str, float | None] = {f"p{percent}": None for percent in percents}
    waiting, left = len(events), 1.0
    for value, ended in events:
        if ended:
            left *= 1 - 1 / waiting
            for percent in percents:
                if found[f"p{percent}"] is None and left <= 1 - percent / 100 + 1e-9:
                    found[f"p{percent}"] = round(value, 1)
        waiting -= 1
    return found


def share(part: int, whole: int) -> float | None:
    """Return `part / whole`, rounded to four digits; None if `whole` is 0."""
    return round(part / whole, 4) if whole else None


def peak_rss_mb(process_id: int) -> float:
    """Return the peak of a running process's resident memory, in MB of 10**6 bytes.

    Where the system does not record the peak (other than Linux and Windows), return the present value.
    """
    status = Path(f"/proc/{process_id}/status")
    if status.exists() and (found := _PEAK.search(status.read_text(encoding="utf-8"))):
        return round(int(found[1]) * 1024 / _MB, 1)
    memory = psutil.Process(process_id).memory_info()
    return round(getattr(memory, "peak_wset", memory.rss) / _MB, 1)
