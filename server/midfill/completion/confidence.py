"""How likely a suggestion is right, and how much of it is worth showing. Pure: text to numbers.

A model seldom ends where a user would: often its first line is right and the lines after it are guesses.
So the question is asked of each beginning of the suggestion that ends with a line: how likely is it that
all of it is what the user would write? A logistic model answers, from the log-probabilities of the tokens
and from the place. Shown is the longest beginning that is likely enough; if there is none, nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum


class Eagerness(StrEnum):
    """How sure midfill is before it shows something unasked."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Evidence:
    r"""What there is to judge a suggestion by.

    Attributes:
        text: the suggestion, with \n.
        tokens: for each token that it is made of: where it ends in the text, and its natural log-probability.
        finished: the text came to an end of its own, not to the token limit.
        line_before: the cursor's line up to the cursor.
    """

    text: str
    tokens: tuple[tuple[int, float], ...]
    finished: bool
    line_before: str


# A beginning whose tokens are as unlikely as this is as good as impossible.
_LEAST_LOGPROB = -20.0
_LONG_PREFIX = 40
_OPENERS = ("(", "[", "{", ",")
_CLOSERS = (")", "]", "}", ";", ":")


def line_prefixes(text: str) -> Iterator[int]:
    """Where the lines of a text end that are not blank."""
    end = 0
    for line in text.split("\n"):
        end += len(line)
        if line.strip():
            yield end
        end += 1


def features(evidence: Evidence, end: int) -> dict[str, float]:
    """What the model knows of the beginning of a suggestion that ends at `end`.

    The log-probabilities are those of its own tokens. Raises `ValueError` if there are none.
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


# Made by `midfill eval calibrate` from 429 suggestions of qwen2.5-coder-0.5b in eleven runs of
# `midfill eval repo PATH --seed 1 --results FILE` over ten packages; see LOG, "Silence".
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
    """What turns features into a confidence, and a confidence into a decision.

    Attributes:
        weights: by feature, and "bias".
        thresholds: the confidence from which on something is shown, by eagerness.
        source: the user's file that it comes from; "" for the built-in one.
    """

    weights: Mapping[str, float]
    thresholds: Mapping[Eagerness, float]
    source: str = ""


BUILT_IN = Calibration(WEIGHTS, THRESHOLDS)


def confidence(evidence: Evidence, end: int, by: Calibration = BUILT_IN) -> float:
    """How likely it is, 0..1, that the beginning of a suggestion that ends at `end` is right."""
    found = features(evidence, end)
    logit = by.weights["bias"] + sum(by.weights[name] * value for name, value in found.items())
    return 1 / (1 + math.exp(-max(-50.0, min(logit, 50.0))))


def best(evidence: Evidence, by: Calibration = BUILT_IN) -> float:
    """The confidence in the likeliest beginning of a suggestion."""
    return max((confidence(evidence, end, by) for end in line_prefixes(evidence.text)), default=0.0)


def length_to_show(evidence: Evidence, eagerness: Eagerness, by: Calibration = BUILT_IN) -> int:
    """How many characters of a suggestion to show; 0 for none.

    All of it where `eagerness` says so, or where there are no log-probabilities to go by.
    """
    if eagerness is Eagerness.ALWAYS or not evidence.tokens:
        return len(evidence.text)
    threshold = by.thresholds[eagerness]
    shown = 0
    for end in line_prefixes(evidence.text):
        if confidence(evidence, end, by) >= threshold:
            shown = end
    return shown
