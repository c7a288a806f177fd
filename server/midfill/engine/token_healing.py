"""Token healing: find the tokens that may come next when the output must begin with a given text.

Characters that were removed from the prompt's end (half a token, usually) are required at the beginning of
the output. Works on bytes, because a token may hold a part of a character. Knows the vocabulary's bytes,
nothing of tensors or prompts. Built once per model; runs on the engine thread only.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence


class TokenIndex:
    """The vocabulary in byte order, so that the tokens that extend a text are one slice.

    Args:
        vocab: the bytes of each id.
        excluded: ids that are never generated (control tokens). Tokens without bytes are excluded as well.
    """

    def __init__(self, vocab: Sequence[bytes], excluded: frozenset[int]) -> None:
        ids = [token for token, piece in enumerate(vocab) if piece and token not in excluded]
        ids.sort(key=vocab.__getitem__)
        self._pieces = [vocab[token] for token in ids]
        self._ids = array("q", ids)

    def allowed(self, remainder: bytes) -> array[int]:
        """Return the ids whose bytes begin with `remainder` (not empty), or are a beginning of it."""
        low, high = self._range(remainder)
        allowed = self._ids[low:high]
        for end in range(1, len(remainder)):
            # Several ids may have the same bytes; all of them are allowed.
            piece = remainder[:end]
            at = bisect_left(self._pieces, piece)
            while at < len(self._pieces) and self._pieces[at] == piece:
                allowed.append(self._ids[at])
                at += 1
        return allowed

    def _range(self, prefix: bytes) -> tuple[int, int]:
        low = bisect_left(self._pieces, prefix)
        # The upper bound of all texts with the prefix: the prefix with its last byte raised by one.
        stem = prefix.rstrip(b"\xff")
        if not stem:
            return low, len(self._pieces)
        return low, bisect_left(self._pieces, stem[:-1] + bytes([stem[-1] + 1]), low)
