"""Speculative decoding by n-gram lookup: propose draft tokens, so that one pass can yield several tokens.

A pass over a few tokens costs little more than a pass over one, because the weights are read once. So the
tokens that followed the same few tokens before, in a prompt or in an output, are computed along as draft
tokens, and kept as far as the model agrees. The number of draft tokens follows from the recent acceptance
rate and from the measured cost of wider passes; where speculation does not pay, none are proposed.

Knows token ids only, nothing of text, tensors or requests. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

_WIDTHS = (0, 1, 2, 3, 5, 7)
"""Possible numbers of draft tokens. Kernels take 8 rows of activations about as fast as one."""

_NGRAM_SIZES = (3, 2)
"""Sizes of n-grams that are looked up, the most reliable first."""

_MAX_TOKENS = 1 << 16
"""Number of read and written tokens that are remembered: some hundred prompts."""

_GAP = -1
"""Separates texts that do not follow each other."""

_PRIOR_ACCEPTANCE = 0.6
_PRIOR_COST = 0.08
"""Before anything is measured: the acceptance rate, and the cost of a draft token in passes."""

_RATE = 0.1
"""Weight of the newest observation in a moving average."""

_FORGIVENESS = 0.02
"""How fast an n-gram size that is not used any more becomes worth another try."""

_OUTLIER = 3.0
"""Times are cut off at this multiple of the usual: longer ones tell of the machine, not of the width."""


class NgramProposer:
    """Remembers recent tokens, and how often proposals from them were accepted."""

    def __init__(self) -> None:
        self._log: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # a few tokens > where in the log the next one is
        self._acceptance = dict.fromkeys(_NGRAM_SIZES, _PRIOR_ACCEPTANCE)
        self._seconds: dict[int, float] = {}  # by the number of tokens of a pass

    def learn(self, tokens: Sequence[int], start: int = 0) -> None:
        """Remember `tokens` from index `start` on, as what follows the ones before it."""
        if len(self._log) > _MAX_TOKENS:
            self._log.clear()
            self._followers.clear()
        begin = max(0, start - max(_NGRAM_SIZES))
        base = len(self._log)
        self._log.append(_GAP)
        self._log.extend(islice(tokens, begin, None))
        for end in range(max(start, min(_NGRAM_SIZES)), len(tokens)):
            for size in _NGRAM_SIZES:
                if end >= size:
                    self._followers[tuple(tokens[end - size : end])] = base + 1 + end - begin

    def propose(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return draft tokens to follow `tokens`, possibly none, and the size of the matching n-gram."""
        for size in _NGRAM_SIZES:
            position = self._followers.get(tuple(tokens[-size:]))
            if position is None:
                continue
            width = self._best_width(self._acceptance[size])
            if width == 0:
                self._acceptance[size] += _FORGIVENESS * (_PRIOR_ACCEPTANCE - self._acceptance[size])
                continue
            followers = self._log[position : position + width]
            return followers[: followers.index(_GAP)] if _GAP in followers else followers, size
        return [], 0

    def record_acceptance(self, size: int, num_draft_tokens: int, num_accepted: int) -> None:
        """Record that `num_accepted` draft tokens, found by an n-gram of `size`, were accepted."""
        for number in range(min(num_accepted + 1, num_draft_tokens)):
            self._acceptance[size] += _RATE * ((number < num_accepted) - self._acceptance[size])

    def record_duration(self, num_tokens: int, seconds: float) -> None:
        """Record the duration of a pass over `num_tokens` tokens."""
        usual = self._seconds.setdefault(num_tokens, seconds)
        self._seconds[num_tokens] += _RATE * (min(seconds, _OUTLIER * usual) - usual)

    def _best_width(self, acceptance: float) -> int:
        """Return the number of draft tokens with the most tokens per second at this acceptance rate."""

        def speed(width: int) -> float:
            return sum(acceptance**number for number in range(width + 1)) / self._cost(width + 1)

        return max(_WIDTHS, key=speed)

    def _cost(self, num_tokens: int) -> float:
        """Return the cost of a pass over `num_tokens` tokens, in passes over one."""
        one = self._seconds.get(1)
        this = self._seconds.get(num_tokens)
        if one is None or this is None:
            return 1 + _PRIOR_COST * (num_tokens - 1)
        return max(1.0, this / one)
