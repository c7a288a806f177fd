"""Captured passes: their shapes, which one serves a step, and which to capture next.

A CUDA graph is a forward pass that was recorded once and is then launched as a whole; otherwise the host
needs longer to launch a small model's kernels than the device needs to run them. It is bound to a shape, so
that there are only a few: a step takes the smallest captured one that it fits into, padded up to it. To
capture one takes time and memory. It is done while the model loads and when there is nothing else to do,
never while somebody waits; a step for which nothing is captured yet runs without.

Knows integers; nothing of tensors. Runs on the engine thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

WIDTHS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
"""Tokens of each row. Up to 64 cost hardly more than one, for the weights are read once. The others are for
reading a prompt."""

ROWS = (1, 2, 4)
"""Sequences in one pass."""

MOST_SAMPLED = 64
"""The most tokens (rows x width) of a pass that chooses what follows each of them. Larger ones have one row,
and do so for its last tokens only: one that is known, and guesses."""

MOST_GUESSES = 7
"""Guesses of one sequence that a pass can verify."""

FIRST_BUCKET = 256
"""Keys that the smallest pass reads. Each further bucket is twice as long."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a captured pass is bound to.

    Attributes:
        rows: sequences.
        width: tokens of each.
        keys: entries of each slot that are read at most, those of these tokens included.
        head: whether tokens are chosen.
    """

    rows: int
    width: int
    keys: int
    head: bool = True

    @property
    def cost(self) -> tuple[int, int, int, bool]:
        """The less the better, in the order of what costs most."""
        return self.rows * self.width, self.rows, self.keys, self.head

    def serves(self, other: Shape) -> bool:
        """Whether a step of the other shape fits into this one."""
        return (
            self.rows >= other.rows
            and self.width >= other.width
            and self.keys >= other.keys
            and self.head >= other.head
        )


def capacity(context: int, token_bytes: int, num_slots: int, free_bytes: int) -> int:
    """How many tokens each slot can have room for: the context if a third of the free memory is enough.

    Otherwise the largest bucket that fits into that, so that passes and graphs have room too.

    Raises:
        MemoryError: not even the smallest does.
    """
    fitting = free_bytes // 3 // (token_bytes * num_slots)
    if fitting >= context:
        return context
    if fitting < FIRST_BUCKET:
        raise MemoryError(f"{num_slots} slots of {FIRST_BUCKET} tokens do not fit into the device's memory")
    return FIRST_BUCKET << ((fitting // FIRST_BUCKET).bit_length() - 1)


def buckets(longest: int) -> tuple[int, ...]:
    """The numbers of keys that passes are captured for; the last is `longest`."""
    found = []
    length = FIRST_BUCKET
    while length < longest:
        found.append(length)
        length *= 2
    return (*found, longest)


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Which chunks of a step go into one pass: indexes, in order.

    Short ones go together, as many as a captured pass has room for. A long one is a pass of its own.
    """
    together: list[list[int]] = []
    open_group: list[int] = []
    for number in range(len(lengths)):
        if fit([lengths[i] for i in [*open_group, number]]) is None:
            if open_group:
                together.append(open_group)
            open_group = []
        open_group.append(number)
    return [*together, open_group] if open_group else together


def fit(lengths: Sequence[int]) -> tuple[int, int] | None:
    """Rows and width of the smallest pass for chunks of these lengths; None if there is none."""
    rows = next((rows for rows in ROWS if rows >= len(lengths)), None)
    width = next((width for width in WIDTHS if width >= max(lengths)), None)
    if rows is None or width is None or (rows > 1 and rows * width > MOST_SAMPLED):
        return None
    return rows, width


def likely(longest: int) -> Iterator[Shape]:
    """Every shape worth capturing, the likeliest first.

    First those for the longest past: from then on every step of one sequence finds a pass. Then the same for
    shorter ones, which read less. Last, several tokens of several sequences: drafts of several typists.
    """
    for keys in sorted(buckets(longest), key=lambda keys: (keys != longest, keys)):
        for width in WIDTHS:
            if width < keys:
                yield Shape(1, width, keys)
        if WIDTHS[-1] < keys:
            yield Shape(1, WIDTHS[-1], keys, head=False)
        for rows in ROWS[1:]:
            yield Shape(rows, 1, keys)
    for rows, width in product(ROWS[1:], WIDTHS[1:]):
        if rows * width <= MOST_SAMPLED:
            yield Shape(rows, width, longest)


class Graphs(Generic[T]):
    """The captured passes of one model.

    Args:
        longest: the most keys that a pass may read.
        capture: records a pass of a shape; `MemoryError` if there is no room, any other error if this model
            cannot be captured.
        has_room: whether there is memory for another one.
    """

    def __init__(self, longest: int, capture: Callable[[Shape], T], has_room: Callable[[], bool]) -> None:
        self._capture = capture
        self._has_room = has_room
        self._longest = longest
        self._buckets = buckets(longest)
        self._waiting = list(likely(longest))
        self._given_up = False
        self._captured: dict[Shape, T] = {}
        self._choices: dict[Shape, tuple[Shape, T] | None] = {}  # what `find` has answered

    def __len__(self) -> int:
        return len(self._captured)

    def shape(self, rows: int, width: int, end: int, *, head: bool) -> Shape:
        """The smallest shape for rows that end at `end`, padding included."""
        keys = next(keys for keys in self._buckets if keys >= end)
        return Shape(rows, width, keys, head)

    def find(self, wanted: Shape) -> tuple[Shape, T] | None:
        """The cheapest captured pass that serves this shape; None if there is none.

        A shape that is missing is captured next, when there is time.
        """
        if wanted not in self._choices:
            serving = [shape for shape in self._captured if shape.serves(wanted)]
            best = min(serving, key=lambda shape: shape.cost, default=None)
            self._choices[wanted] = None if best is None else (best, self._captured[best])
            if best != wanted and wanted in self._waiting:
                self._waiting.remove(wanted)
                self._waiting.insert(0, wanted)
        return self._choices[wanted]

    @property
    def num_waiting(self) -> int:
        """How many shapes are still to be captured."""
        return len(self._waiting)

    def capture_next(self) -> bool:
        """Capture one more shape, if there is one and room for it. Whether it was done."""
        if not self._waiting:
            return False
        if not self._has_room():
            self._stop("there is no more memory for graphs")
            return False
        shape = self._waiting.pop(0)
        try:
            self._captured[shape] = self._capture(shape)
        except MemoryError:
            self._stop("out of memory")
            return False
        except Exception as error:  # noqa: BLE001 - whatever a model does that cannot be recorded
            _LOG.warning("this model cannot be captured (%s); it runs without graphs", error)
            self._stop("it cannot be captured")
            return False
        self._choices.clear()
        return True

    def restart(self) -> None:
        """Forget all passes and capture them again, unless there is no room for them."""
        self._captured.clear()
        self._choices.clear()
        self._waiting = [] if self._given_up else list(likely(self._longest))

    def drop(self) -> None:
        """Forget all passes and capture no more: memory ran out."""
        self._captured.clear()
        self._choices.clear()
        self._given_up = True
        self._stop("memory ran out")

    def _stop(self, why: str) -> None:
        _LOG.info("%d shapes captured, %d left out: %s", len(self), len(self._waiting), why)
        self._waiting.clear()
