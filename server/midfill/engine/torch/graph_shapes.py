"""Captured graphs: their shapes (buckets), which one serves a step, and which to capture next.

A CUDA graph is a forward pass that was recorded once and is then launched as a whole; otherwise the host
needs longer to launch a small model's kernels than the device needs to run them. A graph is bound to a shape,
so there are only a few: a step uses the smallest captured one that it fits into, padded up to it. Capturing
takes time and memory. It is done while the model loads and when the engine is idle, never while a request
waits; a step that no captured graph fits runs without.

Knows integers; nothing of tensors. Runs on the engine thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Generic, TypeVar

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

WIDTHS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
"""Tokens per row.

Up to 64 cost hardly more than one, because the weights are read once. The larger ones are for prefill.
"""

ROWS = (1, 2, 4)
"""Sequences per pass."""

MOST_SAMPLED = 64
"""Maximum tokens (rows x width) of a pass that chooses what follows each of them.

Larger passes have one row, and choose for its last tokens only: a known one, and draft tokens.
"""

MAX_DRAFT_TOKENS = 7
"""Maximum draft tokens of one sequence that a pass can verify."""

FIRST_BUCKET = 256
"""Keys that the smallest pass reads. Each further bucket is twice as long."""


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The shape that a captured graph is bound to.

    Attributes:
        rows: number of sequences.
        width: tokens per sequence.
        keys: maximum number of entries read of each slot, including those of these tokens.
        head: whether tokens are chosen.
    """

    rows: int
    width: int
    keys: int
    head: bool = True

    @property
    def cost(self) -> tuple[int, int, int, bool]:
        """Sort key: the lower, the cheaper. What costs most comes first."""
        return self.rows * self.width, self.rows, self.keys, self.head

    def serves(self, other: GraphShape) -> bool:
        """Return whether a step of the other shape fits into this one."""
        return (
            self.rows >= other.rows
            and self.width >= other.width
            and self.keys >= other.keys
            and self.head >= other.head
        )


_COMMON_TOKENS = 8192
"""Room for longer prompts than today's settings allow, where memory is not plenty."""


def capacity(context: int, token_bytes: int, num_slots: int, free_bytes: int, prompt_tokens: int = 0) -> int:
    """Return the number of tokens per slot: the context, if a third of the free memory is enough for it.

    Otherwise the largest bucket that fits into a third, so that passes and graphs have room too. If
    `prompt_tokens` is known (the longest prompt with its output), more than that and than 8192 tokens is
    taken only if it fits into an eighth of the memory, and two thirds may be taken for the prompt.

    Raises:
        MemoryError: not even the smallest bucket fits.
    """
    tokens = free_bytes // (token_bytes * num_slots)
    most = context
    if prompt_tokens and tokens // 8 < context:
        most = max(slot_tokens(context, max(prompt_tokens, _COMMON_TOKENS)), _bucket_within(tokens // 8))
    if tokens // 3 >= most:
        return most
    wanted = slot_tokens(context, prompt_tokens) if prompt_tokens else 0
    found = max(_bucket_within(tokens // 3), wanted if wanted <= tokens * 2 // 3 else 0)
    if not found:
        raise MemoryError(f"{num_slots} slots of {FIRST_BUCKET} tokens do not fit into the device's memory")
    return found


def _bucket_within(tokens: int) -> int:
    """Return the largest bucket of at most so many tokens, or 0."""
    return FIRST_BUCKET << ((tokens // FIRST_BUCKET).bit_length() - 1) if tokens >= FIRST_BUCKET else 0


def slot_tokens(context: int, prompt_tokens: int) -> int:
    """Return the smallest bucket that has room for a prompt with its output, at most the context."""
    return min(context, FIRST_BUCKET << (max(prompt_tokens - 1, 0) // FIRST_BUCKET).bit_length())


def buckets(longest: int) -> tuple[int, ...]:
    """Return the numbers of keys that passes are captured for; the last is `longest`."""
    found = []
    length = FIRST_BUCKET
    while length < longest:
        found.append(length)
        length *= 2
    return (*found, longest)


def groups(lengths: Sequence[int]) -> list[list[int]]:
    """Return which chunks of a step go into one pass: their indexes, in order.

    Short chunks share a pass, as many as a captured one has room for. A long chunk has a pass for itself.
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
    """Return rows and width of the smallest pass for chunks of these lengths, or None."""
    rows = next((rows for rows in ROWS if rows >= len(lengths)), None)
    width = next((width for width in WIDTHS if width >= max(lengths)), None)
    if rows is None or width is None or (rows > 1 and rows * width > MOST_SAMPLED):
        return None
    return rows, width


def likely(longest: int) -> Iterator[GraphShape]:
    """Yield every shape worth capturing, the likeliest first.

    First those for the longest past: with these every step of one sequence finds a graph. Then the same for
    shorter ones, which read less. Last, several tokens of several sequences: draft tokens of several users.
    """
    for keys in sorted(buckets(longest), key=lambda keys: (keys != longest, keys)):
        for width in WIDTHS:
            if width < keys:
                yield GraphShape(1, width, keys)
        if WIDTHS[-1] < keys:
            yield GraphShape(1, WIDTHS[-1], keys, head=False)
        for rows in ROWS[1:]:
            yield GraphShape(rows, 1, keys)
    for rows, width in product(ROWS[1:], WIDTHS[1:]):
        if rows * width <= MOST_SAMPLED:
            yield GraphShape(rows, width, longest)


RETRY_S = 60.0
"""After memory ran out, what did not fit is tried again after this time."""


class GraphCache(Generic[T]):
    """The captured graphs of one model.

    A shape that does not fit into memory is skipped, with all that are larger, and tried again later: another
    program may have freed memory by then. Captured graphs stay, because replaying them needs no memory.

    Args:
        longest: maximum number of keys that a pass may read.
        capture: captures a pass of a shape; raises `MemoryError` if there is no room, any other error if this
            model cannot be captured.
        has_room: returns whether there is memory for another graph.
        now: returns a time in seconds.
    """

    def __init__(
        self,
        longest: int,
        capture: Callable[[GraphShape], T],
        has_room: Callable[[], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capture = capture
        self._has_room = has_room
        self._now = now
        self._longest = longest
        self._buckets = buckets(longest)
        self._waiting = list(likely(longest))
        self._skipped: list[GraphShape] = []  # they did not fit
        self._retry_at_s = 0.0
        self._paused_until_s = 0.0
        self._impossible = False
        self._captured: dict[GraphShape, T] = {}
        self._choices: dict[GraphShape, tuple[GraphShape, T] | None] = {}  # memoized results of `find`

    def __len__(self) -> int:
        return len(self._captured)

    def shape(self, rows: int, width: int, end: int, *, head: bool) -> GraphShape:
        """Return the smallest shape for rows that end at `end`, padding included."""
        keys = next(keys for keys in self._buckets if keys >= end)
        return GraphShape(rows, width, keys, head)

    def find(self, wanted: GraphShape) -> tuple[GraphShape, T] | None:
        """Return the cheapest captured graph that serves this shape, or None.

        A missing shape moves to the front of the shapes to capture.
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
        """Number of shapes still to be captured, without those that did not fit."""
        return len(self._waiting)

    @property
    def serves_every_step(self) -> bool:
        """Whether every step of one sequence, and one token of several, finds a graph."""
        return all(
            any(shape.serves(wanted) for shape in self._captured)
            for wanted in likely(self._longest)
            if wanted.keys == self._longest and (wanted.rows == 1 or wanted.width == 1)
        )

    def capture_next(self) -> bool:
        """Capture one more shape, if there is one and room for it. Return whether one was tried."""
        now = self._now()
        if now < self._paused_until_s:
            return False
        if not self._waiting and now >= self._retry_at_s:
            self._waiting, self._skipped = self._skipped, []
        if not self._waiting:
            return False
        if not self._has_room():
            self.pause()
            return False
        shape = self._waiting.pop(0)
        try:
            self._captured[shape] = self._capture(shape)
        except MemoryError:
            larger = [each for each in self._waiting if each.serves(shape)]
            self._waiting = [each for each in self._waiting if each not in larger]
            self._skipped += [shape, *larger]
            self._retry_at_s = now + RETRY_S
            _LOG.info("no memory for the CUDA graph of %s; %d shapes are skipped", shape, 1 + len(larger))
        except Exception as error:
            _LOG.warning("CUDA graphs cannot capture this model (%s); it runs without graphs", error)
            self._impossible = True
            self.clear()
            return False
        self._choices.clear()
        return True

    def pause(self) -> None:
        """Capture no more for a while: memory ran out. The graphs stay."""
        self._paused_until_s = self._now() + RETRY_S
        _LOG.info("%d CUDA graphs captured, %d wait for more memory", len(self), len(self._waiting))

    def restart(self) -> None:
        """Discard all graphs and capture them again."""
        self.clear()
        self._waiting = [] if self._impossible else list(likely(self._longest))

    def clear(self) -> None:
        """Discard all graphs, and capture none until `restart`."""
        self._captured.clear()
        self._choices.clear()
        self._waiting.clear()
        self._skipped.clear()
