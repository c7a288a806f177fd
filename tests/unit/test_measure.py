"""Figures of the measurements: percentiles, fates, sums."""

import os

import pytest

from midfill.bench.backends import EngineJob, SuggestionRequest
from midfill.bench.baselines import Run
from midfill.bench.replay import BackendRun
from midfill.bench.replay_report import compare, summarise
from midfill.system.measure import kaplan_meier, peak_rss_mb, percentile, percentiles, share


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
    assert kaplan_meier([10, 20, 30, 40], [], 50, 95) == {"p50": 20, "p95": 40}
    # Of four, two gave up at 5: the others decide.
    assert kaplan_meier([10, 40], [5, 5], 50) == {"p50": 10}
    # Nobody has waited long enough to tell.
    assert kaplan_meier([10], [20, 20, 20], 50) == {"p50": None}
    assert kaplan_meier([], [], 50) == {"p50": None}


def test_the_peak_of_this_process_is_plausible():
    assert 10 < peak_rss_mb(os.getpid()) < 100_000


def test_speeds_of_a_run():
    run = Run([1, 2, 3], prefill_s=0.5, num_prefilled=100, decode_s=0.1)
    assert run.prefill_tok_s == 200
    assert run.decode_tok_s == pytest.approx(20)
    assert Run([1], 0.5, 100, 0.0).decode_tok_s is None


def job(request, end="stopped", session=0, **costs):
    """A piece of work as the server tells it."""
    known = {
        "num_prompt": 100,
        "num_reused": 0,
        "num_computed": 100,
        "num_generated": 5,
        "num_delivered": 5,
        "first_s": None,
        "last_s": None,
        "left_s": 0.0,
        "freed_s": 0.0,
    }
    return EngineJob(session, request, end, **(known | costs))


ACCEPTED = SuggestionRequest(0, 1.0, 1, answered_s=1.1, text="abc", accepted=True, source="model")
SHOWN = SuggestionRequest(0, 2.0, 2, answered_s=2.2, text="abc", source="model")
REUSED = SuggestionRequest(0, 3.0, 3, answered_s=3.001, text="bc", source="typed-through")
EMPTY = SuggestionRequest(0, 4.0, 4, answered_s=4.05, source="none", reason="model-silent")
GATED = SuggestionRequest(0, 5.0, 5, answered_s=5.001, source="none", reason="mid-word")
CANCELLED = SuggestionRequest(1, 6.0, 6, cancelled_s=6.1, answered_s=6.105, code=-32800)
LATE = SuggestionRequest(1, 7.0, 7, cancelled_s=7.1, answered_s=7.101, text="abc", source="model")
FAILED = SuggestionRequest(1, 8.0, 8, answered_s=8.1, code=-32603)
REQUESTS = [ACCEPTED, SHOWN, REUSED, EMPTY, GATED, CANCELLED, LATE, FAILED]
JOBS = [
    # The document's first prompt, then what is new of it.
    job(1, first_s=1.05, last_s=1.09, left_s=1.1, num_delivered=5, num_generated=6),
    job(2, num_reused=97, num_computed=3, first_s=2.04, last_s=2.12, left_s=2.2),
    job(4, num_reused=98, num_computed=2, first_s=4.03, last_s=4.03, left_s=4.05, num_delivered=1),
    # Taken back at 6.1, before its first token; its last pass ended 30 ms later.
    job(6, "cancelled", 1, num_computed=64, num_generated=0, num_delivered=0, left_s=6.102, freed_s=6.13),
    job(7, "finished", 1, num_reused=64, num_computed=36, first_s=7.05, last_s=7.08, left_s=7.09),
]


def test_every_request_has_a_fate():
    outcomes = [request.outcome for request in (*REQUESTS, SuggestionRequest(1, 9.0))]
    assert outcomes == [
        "accepted",
        "shown",
        "shown",
        "empty",
        "empty",
        "cancelled",
        "late",
        "failed",
        "failed",
    ]


def test_a_session_is_summarised():
    found = summarise(BackendRun(requests=REQUESTS, jobs=JOBS, num_keys=20, num_skipped=3))
    assert found["requests"] == 8
    assert found["suggestion_ms"]["p50"] == pytest.approx(100)
    assert found["model_ran_ms"]["p50"] == pytest.approx(150)
    assert found["reused_share"] == pytest.approx(1 / 3, abs=1e-4)
    assert (found["keystrokes_saved"], found["keystrokes_saved_share"]) == (2, 0.1)
    assert found["shown_before_next_key_share"] == 0.375
    assert found["cancelled_share"] == 0.25
    assert found["reasons"] == {"model-silent": 1, "mid-word": 1}
    assert found["sources"] == {"model": 2, "typed-through": 1}
    assert found["outcomes"] == {
        "accepted": 1,
        "shown": 2,
        "empty": 2,
        "cancelled": 1,
        "late": 1,
        "failed": 1,
    }
    assert found["samples"]["suggestion_ms"] == 3


def test_the_work_of_cancelled_requests_counts():
    found = summarise(BackendRun(requests=REQUESTS, jobs=JOBS, num_keys=20, num_skipped=3))
    # The first of each document: 100 in one go, and 64 + 36 of a prompt that was begun by a cancelled one.
    assert found["samples"]["recomputed_first_tokens"] == 3
    assert found["recomputed_first_tokens"]["p50"] == 64
    # Then 3, 0 (reused), 2, 0 (not asked), and 0 of the one that failed.
    assert found["samples"]["recomputed_tokens"] == 5
    assert found["recomputed_tokens"]["p50"] == 0
    assert found["recomputed_tokens"]["p99"] == pytest.approx(2.96, abs=0.1)
    # From the key at 6.1, not from when the server read the cancellation.
    assert found["cancel_to_free_ms"]["p99"] == pytest.approx(30)
    assert found["cancel_to_answer_ms"]["p99"] == pytest.approx(5)
    # Of 6 + 5 + 5 + 0 + 5 tokens, 5 and 5 were shown; the last of the first was never read.
    assert (found["generated_tokens"], found["wasted_tokens"]) == (21, 11)
    assert found["unaccepted_tokens"] == 5


def test_times_to_the_first_token_are_cold_or_warm():
    found = summarise(BackendRun(requests=REQUESTS, jobs=JOBS))
    assert found["samples"]["first_token_cold_ms"] == 2
    assert found["first_token_cold_ms"]["p50"] == pytest.approx(50)
    assert found["first_token_warm_ms"] == {"p50": 35.0, "p95": 39.5, "p99": 39.9}
    # 40 ms for 4 more tokens, 80 ms, 30 ms; the output of one token tells nothing.
    assert found["samples"]["ms_per_token"] == 3
    assert found["ms_per_token"]["p50"] == pytest.approx(10)


def test_a_suggestion_whose_first_request_was_cancelled_is_not_wasted():
    """The work outlives its request since what is typed agrees, and is shown to the next one."""
    requests = [
        SuggestionRequest(0, 1.0, 1, cancelled_s=1.1, answered_s=1.101, code=-32800),
        SuggestionRequest(0, 1.2, 2, answered_s=1.4, text="bc", source="joined", accepted=True),
    ]
    done = job(1, "finished", first_s=1.15, last_s=1.38, left_s=1.39, freed_s=1.4)
    found = summarise(BackendRun(requests=requests, jobs=[done]))
    assert (found["generated_tokens"], found["wasted_tokens"], found["unaccepted_tokens"]) == (5, 0, 0)
    # The typist waited for the model all the same.
    assert (found["model_ran_ms"]["p50"], found["reused_share"]) == (pytest.approx(200), 0)


def test_work_that_is_kept_and_dropped_later_is_freed_from_then_on():
    requests = [SuggestionRequest(0, 1.0, 1, cancelled_s=1.1, answered_s=1.101, code=-32800)]
    dropped = job(1, "cancelled", left_s=1.3, freed_s=1.33)
    found = summarise(BackendRun(requests=requests, jobs=[dropped]))
    assert found["cancel_to_free_ms"]["p99"] == pytest.approx(30)


def test_work_done_ahead_is_wasted_until_it_is_shown():
    requests = [
        SuggestionRequest(0, 1.0, 1, answered_s=1.1, text="abc", source="model"),
        SuggestionRequest(0, 2.0, 2, answered_s=2.01, text="c", source="typed-through"),
        SuggestionRequest(0, 3.0, 3, answered_s=3.01, text="next", source="prefetch"),
    ]
    own, ahead = (
        job(1, left_s=1.1),
        job(1, "finished", idle=True, left_s=1.5, num_generated=8, num_delivered=8),
    )
    wasted = summarise(BackendRun(requests=requests[:2], jobs=[own, ahead]))["wasted_tokens"]
    assert wasted == 8
    assert summarise(BackendRun(requests=requests, jobs=[own, ahead]))["wasted_tokens"] == 0


def test_what_a_contender_does_not_tell_is_null():
    requests = [SuggestionRequest(0, 1.0, 1, answered_s=1.1, text="abc", source="model")]
    found = summarise(BackendRun("llama.cpp", requests, [EngineJob(0, 1, "cancelled")]))
    assert found["recomputed_tokens"] == {"p50": None, "p99": None}
    assert found["generated_tokens"] is found["wasted_tokens"] is None
    assert found["cancel_to_free_ms"]["p99"] is None


def test_a_session_without_requests_is_summarised():
    found = summarise(BackendRun())
    assert found["requests"] == 0
    assert found["suggestion_ms"] == {"p50": None, "p95": None, "p99": None}
    assert found["reused_share"] is None


def test_contenders_are_compared():
    def run(name, waited_s, *, cancelled=0):
        request = [
            SuggestionRequest(0, 1.0, n, answered_s=1.0 + waited_s, text="a", source="model")
            for n in range(4)
        ]
        cut = [SuggestionRequest(0, 1.0, 9, cancelled_s=1.9, answered_s=1.9, code=-32800)] * cancelled
        return BackendRun(name, [*request, *cut])

    found = compare(run("midfill", 0.1), [run("llama.cpp", 0.4, cancelled=4)])
    assert found["llama.cpp"] == {
        "suggestion_p50": 0.25,
        "model_ran_p50": 0.25,
        "awaited_p50": 0.25,
        "shown_before_next_key_share": 2.0,
        "keystrokes_saved": None,
    }
