"""NgramProposer: tokens that may well come next, so that one forward pass can yield several.

A pass over a few tokens costs little more than a pass over one, because the weights are read once. So
what followed the same few tokens before, in a prompt or in an output, is computed along as a propose and
kept as far as the model agrees. How much to propose is decided by what guessing has been worth lately and what
wider passes cost here; where it does not pay, nothing is guessed.

Knows token ids only, nothing of text, tensors or requests. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

_WIDTHS = (0, 1, 2, 3, 5, 7)
"""How many tokens may be guessed at a time. Kernels take 8 rows of activations about as fast as one."""

_CONTEXTS = (3, 2)
"""How many tokens have to be the same for what followed them to be a propose, the surest first."""

_MOST_TOKENS = 1 << 16
"""Of what was read and written, this much is remembered: some hundred prompts."""

_GAP = -1
"""Between texts that do not follow each other."""

_PRIOR_RIGHT = 0.6
_PRIOR_COST = 0.08
"""Before anything is measured: a propose is right this often, and adds this share of a pass."""

_RATE = 0.1
"""Weight of the newest observation in a moving average."""

_FORGIVENESS = 0.02
"""How fast a source that is not used any more becomes worth a try again."""

_OUTLIER = 3.0
"""A pass that took so many times longer than usual says something of the machine, not of its width."""


class NgramProposer:
    """What was read and written lately, and how often going on like it was right."""

    def __init__(self) -> None:
        self._log: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # a few tokens > where in the log the next one is
        self._right = dict.fromkeys(_CONTEXTS, _PRIOR_RIGHT)
        self._seconds: dict[int, float] = {}  # by the number of tokens of a pass

    def learn(self, tokens: Sequence[int], start: int = 0) -> None:
        """Remember `tokens` from index `start` on, as what follows the ones before it."""
        if len(self._log) > _MOST_TOKENS:
            self._log.clear()
            self._followers.clear()
        begin = max(0, start - max(_CONTEXTS))
        base = len(self._log)
        self._log.append(_GAP)
        self._log.extend(islice(tokens, begin, None))
        for end in range(max(start, min(_CONTEXTS)), len(tokens)):
            for size in _CONTEXTS:
                if end >= size:
                    self._followers[tuple(tokens[end - size : end])] = base + 1 + end - begin

    def propose(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """What may follow `tokens`, possibly nothing, and the number of tokens that it was found by."""
        for size in _CONTEXTS:
            place = self._followers.get(tuple(tokens[-size:]))
            if place is None:
                continue
            width = self._best_width(self._right[size])
            if width == 0:
                self._right[size] += _FORGIVENESS * (_PRIOR_RIGHT - self._right[size])
                continue
            followers = self._log[place : place + width]
            return followers[: followers.index(_GAP)] if _GAP in followers else followers, size
        return [], 0

    def record_acceptance(self, size: int, num_draft_tokens: int, num_right: int) -> None:
        """Take note of how many guesses, found by `size` tokens, came true before the first that did not."""
        for number in range(min(num_right + 1, num_draft_tokens)):
            self._right[size] += _RATE * ((number < num_right) - self._right[size])

    def record_duration(self, num_tokens: int, seconds: float) -> None:
        """Take note of what a pass over so many tokens took."""
        usual = self._seconds.setdefault(num_tokens, seconds)
        self._seconds[num_tokens] += _RATE * (min(seconds, _OUTLIER * usual) - usual)

    def _best_width(self, right: float) -> int:
        """The number of guesses that yields the most tokens per second, if each is right so often."""

        def speed(width: int) -> float:
            return sum(right**number for number in range(width + 1)) / self._cost(width + 1)

        return max(_WIDTHS, key=speed)

    def _cost(self, num_tokens: int) -> float:
        """What a pass over so many tokens takes, in passes over one."""
        one = self._seconds.get(1)
        this = self._seconds.get(num_tokens)
        if one is None or this is None:
            return 1 + _PRIOR_COST * (num_tokens - 1)
        return max(1.0, this / one)
