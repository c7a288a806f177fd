from collections import Counter

import pytest

from midfill.bench.soak import Sample, evaluate


def samples(resident, threads=lambda _: 5, descriptors=lambda _: 9):
    shares = [number / 100 for number in range(101)]
    return [Sample(share, resident(share), threads(share), descriptors(share)) for share in shares]


def test_what_stays_as_it_is_is_fine():
    # The start does not count, nor does what comes and goes.
    found = evaluate(samples(lambda share: min(80.0, 40 + 200 * share) + (share * 1000) % 7), 10, Counter())
    assert found["wrong"] == []
    assert found["resident_mb"]["most"] == pytest.approx(86, abs=1)


def test_memory_that_grows_from_the_first_third_on_is_told():
    found = evaluate(samples(lambda share: 80 + 30 * share), 10, Counter())
    growth = found["resident_mb"]["growth"]
    assert growth == pytest.approx(17, abs=0.5)
    assert found["wrong"] == [f"Memory grew by {growth} MB."]
    assert evaluate(samples(lambda share: 80 + 30 * share), 20, Counter())["wrong"] == []


def test_threads_and_descriptors_that_are_left_are_told():
    found = evaluate(
        samples(lambda _: 80.0, lambda share: 5 + int(10 * share), lambda share: 9 + int(20 * share)),
        10,
        Counter(),
    )
    assert [sentence.split()[0] for sentence in found["wrong"]] == ["Threads", "Descriptors"]


def test_what_was_not_answered_or_differs_is_told():
    counts = Counter(unanswered=1, errors=2, differing=3, cancelled=500)
    found = evaluate(samples(lambda _: 80.0), 10, counts, status=-9)
    assert found["wrong"] == [
        "1 requests were not answered.",
        "2 requests were answered with an error.",
        "3 documents differed from the user's copy.",
        "The server ended with status -9.",
    ]
