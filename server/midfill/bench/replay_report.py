"""The figures of a replay: of one backend, and of several side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from midfill.bench.backends import OUTCOMES, EngineJob, SuggestionRequest
from midfill.bench.replay import BackendRun
from midfill.system.measure import kaplan_meier, percentiles, share

_FREE = {"accepted", "shown", "empty"}
_BY_MODEL = {"model", "joined", ""}
"""Sources of suggestions for which the model ran while the user waited; "" if the source is not known."""
_AT_ONCE_MS = 5.0


def summarise(run: BackendRun) -> dict[str, Any]:
    """Return the figures as `--json` prints them. Figures that a backend does not report are null.

    suggestion_ms: time from a request to a suggestion, of suggestions shown before the next key.
        model_ran_ms: the same, of suggestions that waited for the model, also for one in flight ("joined").
    answer_ms: time to an answer, with or without a suggestion. awaited_ms: the same without cancellations:
        cancelled requests count as longer than observed (Kaplan-Meier).
    first_token_warm_ms, first_token_cold_ms: time from a request to the first token, of cancelled requests
        too. Cold: before the first prompt of the document has been computed.
    ms_per_token: time per token, of outputs of at least two tokens.
    recomputed_tokens: prompt tokens computed per request, cancelled ones included; 0 without the model.
        recomputed_first_tokens: the same, of cold requests.
    cancel_to_free_ms: time from the key, or whatever else ended a request, until the engine was free.
    cancel_to_answer_ms: time from the key to the answer to the cancelled request.
    reused_share: share of the shown suggestions for which the model did not run.
    inside_right_suggestion: requests in a text that is an earlier one plus a typed part of its suggestion:
        the share answered by a suggestion without the model in less than 5 ms, and the time to the answers.
    generated_tokens: tokens that the model generated. wasted_tokens: those that were never shown: of other
        outputs, or after the end of a suggestion.
    unaccepted_tokens: tokens of suggestions that were shown but not accepted.
    keystrokes_saved: skipped keys, less one for each acceptance.
    outcomes: number of requests by outcome, see `backends.OUTCOMES`.
    samples: number of values of the percentiles.
    """
    requests = run.requests
    outcomes = Counter(request.outcome for request in requests)
    answered = [request for request in requests if request.outcome in _FREE]
    shown = [request for request in answered if request.text]
    saved = run.num_skipped - outcomes["accepted"]
    times = _times(run, answered, shown)
    cut_short = [request.waited_ms for request in requests if request.outcome in {"cancelled", "late"}]
    return {
        "requests": len(requests),
        **{name: percentiles(values, *_PERCENTS.get(name, (50, 95, 99))) for name, values in times.items()},
        "awaited_ms": kaplan_meier(times["answer_ms"], cut_short, 50, 95),
        "reused_share": share(sum(request.source not in _BY_MODEL for request in shown), len(shown)),
        "inside_right_suggestion": _inside([request for request in requests if request.inside]),
        "keystrokes_saved": saved,
        "keystrokes_saved_share": share(saved, run.num_keys),
        **_tokens(run),
        "shown_before_next_key_share": share(len(shown), len(requests)),
        "cancelled_share": share(outcomes["cancelled"] + outcomes["late"], len(requests)),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "sources": dict(Counter(request.source for request in shown).most_common()),
        "reasons": _reasons(requests),
        "peak_rss_mb": run.peak_rss_mb,
        "startup_s": round(run.startup_s, 2),
        "first_suggestion_s": _rounded(run.first_suggestion_s),
        "sessions": run.num_sessions,
        "keys": run.num_keys,
        "seconds": round(run.seconds, 1),
        "samples": {name: len(values) for name, values in times.items()},
    }


def _times(
    run: BackendRun, answered: Sequence[SuggestionRequest], shown: Sequence[SuggestionRequest]
) -> dict[str, list[float]]:
    """Return all values that percentiles are made of, by name."""
    return {
        "suggestion_ms": [request.waited_ms for request in shown],
        "model_ran_ms": [request.waited_ms for request in shown if request.source in _BY_MODEL],
        "answer_ms": [request.waited_ms for request in answered],
        **_work_times(run),
        "cancel_to_answer_ms": [
            (request.answered_s - request.cancelled_s) * 1000
            for request in run.requests
            if request.outcome == "cancelled"
            and request.answered_s is not None
            and request.cancelled_s is not None
        ],
    }


def _reasons(requests: Sequence[SuggestionRequest]) -> dict[str | None, int]:
    """Return the numbers of requests without a suggestion, by reason."""
    return dict(
        Counter(
            request.reason
            for request in requests
            if request.outcome == "empty" or (request.outcome == "failed" and request.reason)
        ).most_common()
    )


def _inside(requests: Sequence[SuggestionRequest]) -> dict[str, Any]:
    """Return the figures of requests inside an earlier suggestion that is being typed."""
    answered = [request for request in requests if request.outcome in _FREE]
    quick = [
        request
        for request in answered
        if request.text and request.source not in _BY_MODEL and request.waited_ms < _AT_ONCE_MS
    ]
    return {
        "requests": len(requests),
        "share_without_model": share(len(quick), len(requests)),
        **{
            f"{name}_ms": value
            for name, value in percentiles([a.waited_ms for a in answered], 50, 95).items()
        },
    }


def _work_times(run: BackendRun) -> dict[str, list[float]]:
    """Return times and prompt tokens of the engine's jobs."""
    jobs: dict[tuple[int, int | None], list[EngineJob]] = {}
    for job in run.jobs:
        if not job.idle:
            jobs.setdefault((job.session, job.request), []).append(job)
    found: dict[str, list[float]] = {
        name: []
        for name in (
            "first_token_warm_ms",
            "first_token_cold_ms",
            "ms_per_token",
            "recomputed_tokens",
            "recomputed_first_tokens",
            "cancel_to_free_ms",
        )
    }
    told = any(job.num_reused is not None for job in run.jobs)
    warm: set[int] = set()
    for request in run.requests:
        own = jobs.get((request.session, request.id), [])
        cold = request.session not in warm
        if told:
            name = "recomputed_first_tokens" if cold else "recomputed_tokens"
            found[name].append(sum(job.num_computed or 0 for job in own))
        for job in own:
            if job.first_s is not None:
                warm.add(request.session)
                name = "first_token_cold_ms" if cold else "first_token_warm_ms"
                found[name].append((job.first_s - request.asked_s) * 1000)
            found["cancel_to_free_ms"] += _freed_after_ms(request, job)
    for job in run.jobs:
        if job.first_s is not None and job.last_s is not None and (job.num_delivered or 0) > 1:
            found["ms_per_token"].append((job.last_s - job.first_s) * 1000 / ((job.num_delivered or 0) - 1))
    return found


def _freed_after_ms(request: SuggestionRequest, job: EngineJob) -> list[float]:
    """Return the milliseconds from the end of interest in a job, such as a key, until the engine was free."""
    if job.end != "cancelled" or job.freed_s is None or job.left_s is None:
        return []
    # A job outlives its request while the typed text agrees with it; then a later edit ends it.
    wanted_to_s = job.left_s
    if request.cancelled_s is not None and job.left_s - request.cancelled_s < _OUTLIVES_S:
        wanted_to_s = request.cancelled_s
    return [max(0.0, job.freed_s - wanted_to_s) * 1000]


_OUTLIVES_S = 0.02
"""A server handles a cancellation within this time; a job that ended later was kept on purpose."""


def _tokens(run: BackendRun) -> dict[str, int | None]:
    """Return the numbers of generated tokens, of those never shown, and of those shown but not accepted."""
    counted = [job for job in run.jobs if job.num_generated is not None]
    if not counted:
        return dict.fromkeys(("generated_tokens", "wasted_tokens", "unaccepted_tokens"))
    generated = sum(job.num_generated or 0 for job in counted)
    shown, accepted = _used(run)
    delivered = {id(job): job.num_delivered or 0 for job in counted}
    seen = sum(delivered[id(job)] for job in counted if id(job) in shown)
    taken = sum(delivered[id(job)] for job in counted if id(job) in accepted)
    return {
        "generated_tokens": generated,
        "wasted_tokens": generated - seen,
        "unaccepted_tokens": seen - taken,
    }


def _used(run: BackendRun) -> tuple[set[int], set[int]]:
    """Return the ids of the jobs whose text was shown, and of those whose text was accepted.

    A suggestion for which the model ran comes from the last job of its request; a reused one, from the newest
    job of the document that ended before and was not cancelled.
    """
    shown: set[int] = set()
    accepted: set[int] = set()
    good = [job for job in run.jobs if job.end in {"finished", "stopped"} and job.left_s is not None]
    for request in run.requests:
        if not request.text or request.answered_s is None or request.outcome not in {"accepted", "shown"}:
            continue
        own = [
            job
            for job in good
            if (job.session, job.request) == (request.session, request.id) and not job.idle
        ]
        before = [
            job
            for job in good
            if job.session == request.session
            and (job.left_s or 0.0) <= request.answered_s
            # Of prefetched jobs, only those for exactly this text.
            and (not job.idle or request.source in {"prefetch", "cache"})
        ]
        source = (
            own[-1:] if request.source == "model" else sorted(before, key=lambda job: job.left_s or 0.0)[-1:]
        )
        for job in source:
            shown.add(id(job))
            if request.accepted:
                accepted.add(id(job))
    return shown, accepted


def compare(ours: BackendRun, others: Sequence[BackendRun]) -> dict[str, dict[str, Any]]:
    """Return our figures divided by each baseline's: better below 1 for times, above 1 for the others."""
    found = {}
    for other in others:
        mine, theirs = summarise(ours), summarise(other)
        found[other.name] = {
            **{
                f"{name}_p50": _ratio(mine[f"{name}_ms"]["p50"], theirs[f"{name}_ms"]["p50"])
                for name in ("suggestion", "model_ran", "awaited")
            },
            **{
                name: _ratio(mine[name], theirs[name])
                for name in ("shown_before_next_key_share", "keystrokes_saved")
            },
        }
    return found


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else round(mine / theirs, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


_PERCENTS: dict[str, tuple[int, ...]] = {
    "recomputed_tokens": (50, 99),
    "recomputed_first_tokens": (50, 99),
    "cancel_to_free_ms": (50, 99),
    "cancel_to_answer_ms": (50, 99),
    "ms_per_token": (50, 95),
}
_ROWS = (
    ("suggestion_ms", "time to a suggestion, ms", "shown before the next key"),
    ("model_ran_ms", "... where the model ran, ms", ""),
    ("answer_ms", "time to an answer, ms", "also without a suggestion"),
    ("awaited_ms", "... without cancellations, ms", "estimated (Kaplan-Meier)"),
    ("first_token_warm_ms", "time to the first token, warm, ms", "cancelled requests too"),
    ("first_token_cold_ms", "... the first in a document, ms", ""),
    ("ms_per_token", "ms per token", ""),
    ("recomputed_tokens", "prompt tokens computed", "per request, cancelled ones too"),
    ("recomputed_first_tokens", "... the first in a document", ""),
    ("cancel_to_free_ms", "cancel to free, ms", "from the next key until the engine is free"),
    ("cancel_to_answer_ms", "... to the answer -32800, ms", ""),
    ("shown_before_next_key_share", "shown before the next key", "share of the requests"),
    ("reused_share", "suggestions without the model", ""),
    ("inside_right_suggestion", "... while typing a suggestion", "in less than 5 ms"),
    ("cancelled_share", "cancelled", "share of the requests"),
    ("keystrokes_saved", "keystrokes saved", "less one for each acceptance"),
    ("keystrokes_saved_share", "... share of the keys", ""),
    ("generated_tokens", "tokens generated", ""),
    ("wasted_tokens", "... never shown", "cancelled, or not used"),
    ("unaccepted_tokens", "... shown, not accepted", ""),
    ("outcomes", "outcomes", ""),
    ("sources", "suggestions from", ""),
    ("reasons", "no suggestion, because", ""),
    ("peak_rss_mb", "peak memory, MB", ""),
    ("startup_s", "start to model loaded, s", ""),
    ("first_suggestion_s", "start to first suggestion, s", ""),
)


def table(summary: dict[str, Any]) -> Any:
    """Return the figures as a rich table with a column for each backend."""
    from rich.table import Table

    others = summary.get("others", {})
    title = "{requests} requests, {keys} keys in {sessions} sessions, {seconds} s".format(**summary)
    grid = Table(title=title, title_justify="left", show_header=bool(others), box=None, padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for name in ("midfill", *others):
        grid.add_column(name)
    grid.add_column(style="dim")
    for key, label, note in _ROWS:
        grid.add_row(label, *(cell(key, found[key]) for found in (summary, *others.values())), note)
    grid.caption = "\n".join(
        f"midfill / {name}: " + ", ".join(f"{key} {'-' if v is None else v}" for key, v in ratios.items())
        for name, ratios in summary.get("ratios", {}).items()
    )
    grid.caption_justify = "left"
    return grid


def cell(key: str, value: Any) -> str:
    """Return a figure as text; shares in per cent."""
    if isinstance(value, dict):
        parts = (f"{name} {'-' if item is None else item}" for name, item in value.items())
        return "  ".join(parts) or "-"
    if value is None:
        return "-"
    return f"{value:.1%}" if key.endswith("_share") else str(value)
