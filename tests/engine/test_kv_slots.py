from __future__ import annotations

from midfill.engine.kv_slots import Lease, Slots, common_prefix

KEY = ("model", None)


def fill(slots: Slots, tokens: list[int], key=KEY) -> int:
    lease = slots.acquire(key, tokens)
    slots.extend(lease.slot, tokens[lease.reused :])
    slots.release(lease.slot)
    return lease.slot


def test_common_prefix():
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    for at in range(9):
        left = list(range(9))
        right = [*left[:at], -1, *left[at + 1 :]]
        assert common_prefix(left, right) == at


def test_an_empty_slot_reuses_nothing():
    assert Slots(2).acquire(KEY, [1, 2]) == Lease(0, 0)


def test_the_longest_prefix_is_reused_in_place_and_the_rest_cut_off():
    slots = Slots(2)
    slot = fill(slots, [1, 2, 3, 4, 5])
    assert slots.acquire(KEY, [1, 2, 3, 9]) == Lease(slot, 3)
    assert slots.tokens(slot) == [1, 2, 3]


def test_the_last_token_is_always_computed():
    slots = Slots(1)
    fill(slots, [1, 2, 3])
    assert slots.acquire(KEY, [1, 2, 3]).reused == 2
    slots.release(0)
    assert slots.acquire(KEY, [1]).reused == 0


def test_another_key_is_not_reused():
    slots = Slots(2)
    fill(slots, [1, 2, 3])
    assert slots.acquire(("model", "adapter"), [1, 2, 3, 4]).reused == 0


def test_a_short_common_prefix_is_copied_so_that_the_other_document_stays():
    slots = Slots(2)
    first = fill(slots, [1, 2, 3, 4, 5, 6, 7])
    lease = slots.acquire(KEY, [1, 2, 9, 9])
    assert lease == Lease(1 - first, 2, copy_from=first)
    assert slots.tokens(first) == [1, 2, 3, 4, 5, 6, 7]
    assert slots.tokens(lease.slot) == [1, 2]


def test_the_prefix_of_a_leased_slot_is_copied():
    slots = Slots(2)
    busy = slots.acquire(KEY, [1, 2, 3]).slot
    slots.extend(busy, [1, 2, 3])
    assert slots.acquire(KEY, [1, 2, 3, 4]) == Lease(1 - busy, 3, copy_from=busy)


def test_the_slot_unused_the_longest_is_evicted():
    slots = Slots(3)
    used = [fill(slots, [token] * 5) for token in (1, 2, 3)]
    fill(slots, [1] * 6)
    assert slots.acquire(KEY, [4, 4]).slot == used[1]


def test_the_only_slot_is_cut_even_if_little_remains():
    slots = Slots(1)
    fill(slots, [1, 2, 3, 4, 5, 6])
    assert slots.acquire(KEY, [1, 9]) == Lease(0, 1)
    assert slots.tokens(0) == [1]


def test_forgotten_tokens_are_not_reused():
    slots = Slots(2)
    slot = fill(slots, [1, 2, 3])
    slots.forget(slot)
    assert slots.acquire(KEY, [1, 2, 3]).reused == 0


def test_shrinking_leaves_half_of_the_slots_and_one_at_least():
    slots = Slots(4)
    busy = slots.acquire(KEY, [1, 2, 3]).slot
    kept = fill(slots, [7, 8])
    assert sorted(slots.shrink()) == sorted({0, 1, 2, 3} - {busy})
    assert len(slots) == 2
    assert slots.num_free == 1
    assert slots.acquire(KEY, [7, 8, 9]).reused == 0
    slots.release(busy)
    slots.shrink()
    slots.shrink()
    assert len(slots) == 1
    assert kept != busy
