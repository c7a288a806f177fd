"""Find the number of engine replicas that a number of users needs, by simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from midfill.bench.engine_profile import EngineProfile
from midfill.bench.load import WARM_S, Goal, LoadPlan
from midfill.bench.simulation import ReplicaSet, predict

_GROUP = (2, 4)
"""Number of replicas to simulate: with sticky routing a few are representative of many."""
_ENOUGH_USERS = 160
_SAMPLES = 10_000
_PRECISION = 0.05
_SHORTEST_S, _LONGEST_S = 6.0, 600.0
_REQUESTS_PER_S = 3.6


def size(
    profile: EngineProfile, users: int, goal: Goal, replica_set: ReplicaSet, seed: int = 0
) -> dict[str, Any]:
    """Return the number of replicas that meet the goal for a number of users.

    With sticky routing a few replicas are representative, so the number of users per replica is found by
    bisection on a few.

    Returns:
        "replicas": None if even a single user misses the goal; "users_per_replica"; "limit": the criterion
        that one more user would miss; "alone" and "loaded": the figures of a single user, and of replicas
        with that many users.
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
    # The goal is met with `good` users, and missed with `bad`.
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
    """Simulate some replicas with a number of users each, long enough for stable figures."""
    if replicas is None:
        replicas = max(_GROUP[0], min(_GROUP[1], _ENOUGH_USERS // per_replica))
    users = per_replica * replicas
    seconds = min(_LONGEST_S, max(_SHORTEST_S, _SAMPLES / (_REQUESTS_PER_S * users)))
    plan = LoadPlan(users, seconds + WARM_S, seed)
    return predict(profile, plan, replace(replica_set, replicas=replicas))


def table(result: dict[str, Any]) -> Any:
    """Return the result as a rich table."""
    from rich.table import Table

    title = "{model} ({where}): p95 <= {target_ms:g} ms, {served:.0%} of a single user's suggestions".format(
        **result
    )
    grid = Table(title=title, title_justify="left", box=None)
    for name in ("users", "replicas", "users each", "limited by", "p50, p95 ms", "shown"):
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
