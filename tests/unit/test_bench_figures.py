"""Figures of the measurements: percentiles, fates, sums."""

import os

import pytest

from midfill.bench.figures import awaited, peak_rss_mb, percentile, percentiles, share
from midfill.bench.replay import Asked, Session, summarise
from midfill.bench.rivals import Run


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([3.0], 99, 3.0),
        ([4, 1, 3, 2], 0, 1),
        ([4, 1, 3, 2], 50, 2.5),
        ([4, 1, 3, 2], 100, 4),
        (list(range(101)), 95, 95),
    ],
)
def test_percentiles_are_interpolated(values, percent, expected):
    assert percentile(values, percent) == expected


def test_percentiles_have_names():
    assert percentiles([1, 2], 50, 99) == {"p50": 1.5, "p99": 2.0}
    assert percentiles([], 50) == {"p50": None}
    assert (share(1, 3), share(0, 0)) == (0.3333, None)


def test_requests_cut_short_count_as_longer_than_they_were():
    assert awaited([10, 20, 30, 40], [], 50, 95) == {"p50": 20, "p95": 40}
    # Of four, two gave up at 5: the others decide.
    assert awaited([10, 40], [5, 5], 50) == {"p50": 10}
    # Nobody has waited long enough to tell.
    assert awaited([10], [20, 20, 20], 50) == {"p50": None}
    assert awaited([], [], 50) == {"p50": None}


def test_the_peak_of_this_process_is_plausible():
    assert 10 < peak_rss_mb(os.getpid()) < 100_000


def test_speeds_of_a_run():
    run = Run([1, 2, 3], prefill_s=0.5, num_prefilled=100, decode_s=0.1)
    assert run.prefill_tok_s == 200
    assert run.decode_tok_s == pytest.approx(20)
    assert Run([1], 0.5, 100, 0.0).decode_tok_s is None


def explained(source="model", prompt=100, reused=0, generated=5, reason=None):
    return {
        "source": source,
        "reason": reason,
        "promptTokens": prompt,
        "reusedTokens": reused,
        "generatedTokens": generated,
    }


ACCEPTED = Asked(0, 1.0, answered_s=1.1, text="abc", accepted=True, explained=explained())
SHOWN = Asked(0, 2.0, answered_s=2.2, text="abc", explained=explained(reused=96))
REUSED = Asked(
    0, 3.0, answered_s=3.001, text="bc", explained=explained("typed-through", reused=0, generated=0)
)
EMPTY = Asked(0, 4.0, answered_s=4.05, explained=explained("none", reused=98, reason="model-silent"))
GATED = Asked(0, 5.0, answered_s=5.001, explained=explained("none", 0, 0, 0, "mid-word"))
CANCELLED = Asked(1, 6.0, cancelled_s=6.1, answered_s=6.105, code=-32800)
LATE = Asked(1, 7.0, cancelled_s=7.1, answered_s=7.101, text="abc", explained=explained())
FAILED = Asked(1, 8.0, answered_s=8.1, code=-32603)


def test_every_request_has_a_fate():
    requests = (ACCEPTED, SHOWN, REUSED, EMPTY, GATED, CANCELLED, LATE, FAILED, Asked(1, 9.0))
    fates = [asked.fate for asked in requests]
    assert fates == ["accepted", "shown", "shown", "empty", "empty", "cancelled", "late", "failed", "failed"]


def test_a_session_is_summarised():
    requests = [ACCEPTED, SHOWN, REUSED, EMPTY, GATED, CANCELLED, LATE, FAILED]
    found = summarise(Session(requests, num_keys=20, num_skipped=3))
    assert found["requests"] == 8
    assert found["suggestion_ms"]["p50"] == pytest.approx(100)
    assert found["model_ran_ms"]["p50"] == pytest.approx(150)
    assert found["recomputed_tokens"] == {"p50": 3.0, "p99": 4.0}
    assert found["recomputed_first_tokens"]["p50"] == 100
    assert found["cancel_to_free_ms"]["p99"] == pytest.approx(5)
    assert found["reused_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert (found["keystrokes_saved"], found["keystrokes_saved_share"]) == (2, 0.1)
    assert (found["generated_tokens"], found["wasted_tokens"]) == (15, 10)
    assert found["shown_before_next_key_share"] == 0.375
    assert found["cancelled_share"] == 0.25
    assert found["reasons"] == {"model-silent": 1, "mid-word": 1}
    assert found["fates"] == {"accepted": 1, "shown": 2, "empty": 2, "cancelled": 1, "late": 1, "failed": 1}


def test_a_session_without_requests_is_summarised():
    found = summarise(Session())
    assert found["requests"] == 0
    assert found["suggestion_ms"] == {"p50": None, "p95": None, "p99": None}
    assert found["reused_share"] is None
