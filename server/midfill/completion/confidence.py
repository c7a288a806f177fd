"""Confidence: how likely a suggestion is right, and how much of it to show. Pure: text to numbers.

A model rarely ends where the user would: often its first line is right and the lines after it are guesses. So
each prefix of the suggestion that ends with a line gets a confidence: the probability that the user would
write all of it. A logistic model computes it from the tokens' log-probabilities and the text around the
cursor. The longest prefix above the threshold is shown; if there is none, nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Eagerness(StrEnum):
    """How confident midfill must be to show an automatic suggestion."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Evidence:
    r"""The inputs for judging a suggestion.

    Attributes:
        text: the suggestion, with \n.
        tokens: (end, log-probability) for each token; `end` is an offset in the text, the logarithm is
            natural.
        finished: the text ended by itself, not at the token limit.
        line_before: the cursor's line up to the cursor.
    """

    text: str
    tokens: tuple[tuple[int, float], ...]
    finished: bool
    line_before: str


# A prefix whose tokens are this unlikely counts as impossible; a lower value changes nothing.
_LEAST_LOGPROB = -20.0
_LONG_PREFIX = 40
_OPENERS = ("(", "[", "{", ",")
_CLOSERS = (")", "]", "}", ";", ":")


def line_prefixes(text: str) -> Iterator[int]:
    """Yield the offsets at which the lines of a text end, blank lines left out."""
    end = 0
    for line in text.split("\n"):
        end += len(line)
        if line.strip():
            yield end
        end += 1


def features(evidence: Evidence, end: int) -> dict[str, float]:
    """Return the model's features of the prefix that ends at `end`, by name.

    The log-probabilities are those of the prefix's tokens. Raises `ValueError` if there are none.
    """
    text, before = evidence.text[:end], evidence.line_before
    starts = (0, *(stop for stop, _ in evidence.tokens))
    logprobs = [logprob for start, (_, logprob) in zip(starts, evidence.tokens, strict=False) if start < end]
    if not logprobs:
        raise ValueError("a suggestion without tokens cannot be judged")
    total = sum(logprobs)
    return {
        "total": max(total, _LEAST_LOGPROB),
        "mean": total / len(logprobs),
        "first": logprobs[0],
        "first_three": sum(logprobs[:3]) / len(logprobs[:3]),
        "least": min(logprobs),
        "log_tokens": math.log(len(logprobs)),
        "log_chars": math.log1p(len(text.strip())),
        "log_lines": math.log(sum(1 for _ in line_prefixes(text))),
        "finished": float(evidence.finished and end == len(evidence.text.rstrip())),
        "new_line": float(text.startswith("\n")),
        "blank_first": float(text.startswith(" ")),
        "line_empty": float(not before.strip()),
        "line_chars": min(len(before.strip()), _LONG_PREFIX) / _LONG_PREFIX,
        "after_opener": float(before.rstrip().endswith(_OPENERS)),
        "after_closer": float(before.rstrip().endswith(_CLOSERS)),
    }


# Fitted by `midfill eval calibrate` to 429 suggestions of qwen2.5-coder-0.5b in eleven runs of `midfill eval
# repo PATH --seed 1 --results FILE` over ten packages; see
# server/docs/experiments/013-confidence-gate.md.
WEIGHTS: dict[str, float] = {
    "bias": 1.7525,
    "total": 0.4514,
    "mean": 0.3257,
    "first": -0.8053,
    "first_three": 1.124,
    "least": 0.1521,
    "log_tokens": -0.7128,
    "log_chars": -0.138,
    "log_lines": -2.4824,
    "finished": 0.9234,
    "new_line": -2.9298,
    "blank_first": -2.8703,
    "line_empty": -0.7911,
    "line_chars": -0.3318,
    "after_opener": -0.1315,
    "after_closer": -0.1247,
}
THRESHOLDS: dict[Eagerness, float] = {
    Eagerness.LOW: 0.34,
    Eagerness.NORMAL: 0.04,
    Eagerness.HIGH: 0.01,
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Weights that turn features into a confidence, and thresholds that turn a confidence into a decision.

    Attributes:
        weights: by feature, and "bias".
        thresholds: the minimum confidence for showing a suggestion, by eagerness.
        source: the user's file that it was read from; "" for the built-in one.
    """

    weights: Mapping[str, float]
    thresholds: Mapping[Eagerness, float]
    source: str = ""


BUILT_IN = Calibration(WEIGHTS, THRESHOLDS)


def confidence(evidence: Evidence, end: int, by: Calibration = BUILT_IN) -> float:
    """Return the probability, 0..1, that the prefix of a suggestion that ends at `end` is right."""
    found = features(evidence, end)
    logit = by.weights["bias"] + sum(by.weights[name] * value for name, value in found.items())
    return 1 / (1 + math.exp(-max(-50.0, min(logit, 50.0))))


def best(evidence: Evidence, by: Calibration = BUILT_IN) -> float:
    """Return the confidence in the likeliest prefix of a suggestion."""
    return max((confidence(evidence, end, by) for end in line_prefixes(evidence.text)), default=0.0)


def length_to_show(evidence: Evidence, eagerness: Eagerness, by: Calibration = BUILT_IN) -> int:
    """Return the number of characters of a suggestion to show; 0 for none.

    All of them if `eagerness` is "always", or if there are no log-probabilities to judge by.
    """
    if eagerness is Eagerness.ALWAYS or not evidence.tokens:
        return len(evidence.text)
    threshold = by.thresholds[eagerness]
    shown = 0
    for end in line_prefixes(evidence.text):
        if confidence(evidence, end, by) >= threshold:
            shown = end
    return shown
