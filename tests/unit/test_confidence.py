import math

import pytest

from midfill.completion.confidence import (
    THRESHOLDS,
    WEIGHTS,
    Eagerness,
    Evidence,
    confidence,
    features,
    length_to_show,
    line_prefixes,
)


def evidence(text, *logprobs, line_before="    x = ", finished=True):
    """Tokens of equal length."""
    size = math.ceil(len(text) / len(logprobs))
    ends = [min(len(text), size * (index + 1)) for index in range(len(logprobs))]
    return Evidence(text, tuple(zip(ends, logprobs, strict=True)), finished, line_before)


def test_a_beginning_ends_with_a_line_that_says_something():
    assert list(line_prefixes("a\n\n  b\n")) == [1, 6]
    assert list(line_prefixes("\nab")) == [3]
    assert list(line_prefixes("")) == []


def test_the_features_are_those_of_the_beginning_only():
    whole = evidence("abcd\nefgh\n", -0.1, -0.2, -5.0, -5.0, -5.0)
    found = features(whole, 4)
    assert found["total"] == pytest.approx(-0.3)
    assert found["log_tokens"] == math.log(2)
    assert found["finished"] == 0.0
    assert features(whole, 9)["finished"] == 1.0
    assert set(found) | {"bias"} == set(WEIGHTS)


def test_likely_tokens_are_shown_and_unlikely_ones_are_not():
    sure, unsure = evidence("compute(value)", -0.01, -0.02), evidence("compute(value)", -3.0, -4.0)
    assert confidence(sure, 14) > 0.5 > THRESHOLDS[Eagerness.NORMAL] > confidence(unsure, 14)
    assert length_to_show(sure, Eagerness.NORMAL) == 14
    assert length_to_show(unsure, Eagerness.NORMAL) == 0


def test_only_the_lines_that_are_likely_are_shown():
    text = "compute(v)\nguesswork\n"
    ends = ((5, -0.01), (10, -0.01), (15, -4.0), (20, -4.0))
    assert length_to_show(Evidence(text, ends, True, "    x = "), Eagerness.NORMAL) == 10


def test_the_more_eager_the_more_is_shown():
    assert THRESHOLDS[Eagerness.LOW] > THRESHOLDS[Eagerness.NORMAL] > THRESHOLDS[Eagerness.HIGH] > 0
    unsure = evidence("compute(value)\nmore", -9.0, -9.0)
    assert length_to_show(unsure, Eagerness.ALWAYS) == len(unsure.text)


def test_without_log_probabilities_everything_is_shown():
    assert length_to_show(Evidence("a", (), True, ""), Eagerness.LOW) == 1
    with pytest.raises(ValueError, match="without tokens"):
        features(Evidence("a", (), True, ""), 1)


def test_nothing_overflows():
    assert 0 <= confidence(evidence("x" * 100_000, -1e9, line_before="y" * 1000), 100_000) < 1e-3
