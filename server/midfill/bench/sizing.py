"""How many replicas of an engine so many typists need: found by simulating."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from midfill.bench.engine_profile import EngineProfile
from midfill.bench.load import WARM_S, Goal, LoadPlan
from midfill.bench.simulation import ReplicaSet, predict

_GROUP = (2, 4)
"""Replicas that are simulated at once: a few show what one of many does, since typists keep to theirs."""
_ENOUGH_USERS = 160
_SAMPLES = 10_000
_PRECISION = 0.05
_SHORTEST_S, _LONGEST_S = 6.0, 600.0
_REQUESTS_PER_S = 3.6


def size(
    profile: EngineProfile, users: int, goal: Goal, replica_set: ReplicaSet, seed: int = 0
) -> dict[str, Any]:
    """Return how many replicas serve so many typists well enough.

    Typists keep to their replicas, so a few of these show what all do; how many typists one serves is found
    by trying.

    Returns:
        "replicas": None if one typist alone has to wait longer; "users_per_replica"; "limit": what one more
        typist would spoil; "alone" and "loaded", the figures of one typist and of a replica with so many.
    """
    alone = _try(profile, 1, replica_set, seed, replicas=1)
    if (limit := goal.missed(alone, alone)) is not None:
        return {
            "users": users,
            "replicas": None,
            "users_per_replica": 0,
            "limit": limit,
            "alone": alone,
            "loaded": None,
        }
    # `good` typists are served, `bad` are not.
    good, loaded, bad, limit = 1, alone, 2, None
    while (
        bad <= users and (limit := goal.missed(found := _try(profile, bad, replica_set, seed), alone)) is None
    ):
        good, loaded, bad = bad, found, bad * 2
    bad = min(bad, users + 1)
    while bad - good > max(1, round(good * _PRECISION)):
        middle = (good + bad) // 2
        if (why := goal.missed(found := _try(profile, middle, replica_set, seed), alone)) is None:
            good, loaded = middle, found
        else:
            bad, limit = middle, why
    return {
        "users": users,
        "replicas": math.ceil(users / good),
        "users_per_replica": good,
        "limit": limit,
        "alone": alone,
        "loaded": loaded,
    }


def _try(
    profile: EngineProfile, per_replica: int, replica_set: ReplicaSet, seed: int, replicas: int | None = None
) -> dict[str, Any]:
    """Some replicas with so many typists each, for as long as it takes to see what they get."""
    if replicas is None:
        replicas = max(_GROUP[0], min(_GROUP[1], _ENOUGH_USERS // per_replica))
    users = per_replica * replicas
    seconds = min(_LONGEST_S, max(_SHORTEST_S, _SAMPLES / (_REQUESTS_PER_S * users)))
    plan = LoadPlan(users, seconds + WARM_S, seed)
    return predict(profile, plan, replace(replica_set, replicas=replicas))


def table(result: dict[str, Any]) -> Any:
    """Return how many replicas, for a person: a rich table."""
    from rich.table import Table  # noqa: PLC0415 - only a person needs it

    title = "{model} ({where}): p95 <= {target_ms:g} ms, {served:.0%} of what one alone gets".format(**result)
    grid = Table(title=title, title_justify="left", box=None)
    for name in ("typing at once", "replicas", "typists each", "limited by", "p50, p95 ms", "shown"):
        grid.add_column(name, justify="right", no_wrap=True)
    for one in result["sizes"]:
        if one["replicas"] is None:
            late = one["alone"]["suggestion_ms"]["p95"]
            grid.add_row(str(one["users"]), "-", "-", one["limit"], f"alone p95 {late}", "-")
            continue
        times, shown = one["loaded"]["suggestion_ms"], one["loaded"]["shown_before_next_key_share"]
        cells = (one["users"], one["replicas"], one["users_per_replica"], one["limit"] or "-")
        grid.add_row(*map(str, cells), f"{times['p50']}, {times['p95']}", f"{shown:.1%}")
    return grid
