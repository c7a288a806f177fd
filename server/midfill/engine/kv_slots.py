"""KV slots: decide which request may reuse which computed tokens.

A slot holds the keys and values of one token sequence. This module remembers which tokens each slot holds and
leases slots; it knows token ids and slot numbers, nothing of tensors, models or editors. Runs on the engine
thread only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

NUM_SLOTS = 4
"""Number of documents whose keys and values are kept at the same time."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A leased slot.

    Attributes:
        slot: its number.
        reused: number of tokens of the request that are computed already, after the copy from `copy_from`.
        copy_from: the slot whose first `reused` entries must be copied into `slot` before use, or None.
    """

    slot: int
    reused: int
    copy_from: int | None = None


@dataclass(slots=True)
class _Slot:
    """Contents and owner of one slot. `last_used` is a logical clock; 0 is never."""

    key: Hashable = None
    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    leased: bool = False
    retired: bool = False
    last_used: int = 0


def common_prefix(left: Sequence[object], right: Sequence[object]) -> int:
    """Return the length of the longest common prefix."""
    limit = min(len(left), len(right))
    # Slices compare in C: the common case (one is the start of the other) needs no Python loop.
    if left[:limit] == right[:limit]:
        return limit
    low, high = 0, limit - 1  # left[:low] agrees; left[: high + 1] does not
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class Slots:
    """A fixed number of slots, leased by longest common prefix.

    A key tells whose keys and values they are (user and adapter): slots of another key are never reused.
    """

    def __init__(self, count: int) -> None:
        self._slots = [_Slot() for _ in range(count)]
        self._clock = 0

    def __len__(self) -> int:
        return sum(not slot.retired for slot in self._slots)

    def tokens(self, slot: int) -> Sequence[int]:
        """Return the tokens whose keys and values the slot holds."""
        return self._slots[slot].tokens

    @property
    def num_free(self) -> int:
        """Number of slots that are not leased."""
        return len(self._free())

    def acquire(
        self, key: Hashable, tokens: list[int], *, owner: str = "", share: int | None = None
    ) -> Lease:
        """Lease the slot in which the fewest of `tokens` must be computed. One slot must be free.

        At least the last token is always left to compute, because its logits are needed. A free slot is cut
        to the common prefix and reused in place if that keeps most of it. Otherwise it holds another
        document, so the prefix is copied to an empty slot or, if there is none, to the least recently used
        one. An `owner` who fills `share` slots already overwrites one of these, if one of them is free.
        """
        free = self._free()
        lengths = {
            number: common_prefix(slot.tokens, tokens)
            for number, slot in enumerate(self._slots)
            if slot.key == key and slot.tokens
        }
        # Prefer reuse in place; of equal ones the most recently used, which is the likeliest to continue.
        best = max(
            lengths,
            key=lambda number: (
                lengths[number],
                not self._slots[number].leased,
                self._slots[number].last_used,
            ),
            default=None,
        )
        reused = 0 if best is None else min(lengths[best], len(tokens) - 1)
        victim = min(self._of(owner, free, share), key=lambda number: self._slots[number].last_used)
        if best is None or reused == 0:
            return self._take(victim, key, owner, [])
        held = self._slots[best]
        if not held.leased and (best == victim or 2 * lengths[best] >= len(held.tokens)):
            return self._take(best, key, owner, tokens[:reused])
        lease = self._take(victim, key, owner, tokens[:reused])
        return lease if best == victim else replace(lease, copy_from=best)

    def _of(self, owner: str, free: list[int], share: int | None) -> list[int]:
        """Return the free slots that an owner may overwrite."""
        if share is None:
            return free
        filled = sum(slot.owner == owner and (slot.leased or bool(slot.tokens)) for slot in self._slots)
        own = [number for number in free if self._slots[number].owner == owner and self._slots[number].tokens]
        return own if own and filled >= share else free

    def _take(self, number: int, key: Hashable, owner: str, tokens: list[int]) -> Lease:
        """Lease a slot that holds these tokens, or will hold them after the copy."""
        slot = self._slots[number]
        slot.key, slot.owner, slot.tokens = key, owner, tokens
        slot.leased = True
        self._touch(slot)
        return Lease(number, len(tokens))

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Record that the keys and values of these tokens follow in the slot."""
        self._slots[slot].tokens.extend(tokens)

    def release(self, slot: int) -> None:
        """End a lease; the contents of the slot stay and can be reused."""
        released = self._slots[slot]
        released.leased = False
        self._touch(released)

    def forget(self, slot: int) -> None:
        """Mark the contents of a slot as unusable; a lease stays."""
        forgotten = self._slots[slot]
        forgotten.tokens = []
        forgotten.key, forgotten.owner = None, ""
        forgotten.last_used = 0

    def shrink(self) -> list[int]:
        """Discard the contents of the free slots and use half as many slots from now on, at least one.

        Leased slots stay. Return the numbers of the free ones, so that their memory can be freed.
        """
        free = self._free()
        num_surplus = len(self) - max(1, len(self) // 2)
        for number in free:
            self.forget(number)
        for number in free[len(free) - min(num_surplus, len(free)) :]:
            self._slots[number].retired = True
        return free

    def _free(self) -> list[int]:
        return [number for number, slot in enumerate(self._slots) if not slot.leased and not slot.retired]

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock if slot.tokens or slot.leased else 0
