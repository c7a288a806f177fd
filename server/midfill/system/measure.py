"""What the measurements share: percentiles, peak memory. Knows nothing of servers and models."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

_MB = 1_000_000
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value below which `percent` of them lie, interpolated linearly; None of no values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Sequence[float], *percents: int) -> dict[str, float | None]:
    """`{"p50": ..., "p99": ...}`, rounded to a tenth."""
    found = ((percent, percentile(values, percent)) for percent in percents)
    return {f"p{percent}": None if value is None else round(value, 1) for percent, value in found}


def kaplan_meier(
    seen: Sequence[float], cut_short: Sequence[float], *percents: int
) -> dict[str, float | None]:
    """Percentiles of waiting times of which some were only seen to be longer than `cut_short` (Kaplan-Meier).

    The plain percentiles of `seen` are those of the lucky ones: a slow answer is more likely to be cut short.
    None where too few were waited for to tell.
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
    """`part / whole`, rounded; None of nothing."""
    return round(part / whole, 4) if whole else None


def peak_rss_mb(process_id: int) -> float:
    """The most memory that a running process has had in RAM, in MB of 10**6 bytes.

    Where the system does not keep the peak (not on Linux, not on Windows), what it has now.
    """
    status = Path(f"/proc/{process_id}/status")
    if status.exists() and (found := _PEAK.search(status.read_text(encoding="utf-8"))):
        return round(int(found[1]) * 1024 / _MB, 1)
    memory = psutil.Process(process_id).memory_info()
    return round(getattr(memory, "peak_wset", memory.rss) / _MB, 1)
