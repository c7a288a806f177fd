"""Packed attention equals attention with repeated keys; a past in slots is read and written in its place."""

from __future__ import annotations

import pytest
import torch
from emulated_cuda import emulated
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from midfill.engine.torch.attention import packed, packed_mask
from midfill.engine.torch.graph_shapes import GraphShape
from midfill.engine.torch.kv_cache import (
    FixedKVCache,
    FixedShapePast,
    GrowingKVCache,
    PackedPast,
    SequenceSpan,
    flash_kernel,
    packed_kernel,
)

WIDTH = 16
HEADS = {"multi-query": (8, 1), "grouped": (6, 2), "one key head each": (4, 4)}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(query, keys, values, start, window=None):
    """All keys before each query, repeated for each query head, by torch."""
    groups = query.shape[1] // keys.shape[1]
    queries = torch.arange(start, start + query.shape[2])[:, None]
    places = torch.arange(keys.shape[2])[None]
    seen = places <= queries
    if window is not None:
        seen &= places > queries - window
    return scaled_dot_product_attention(
        query, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), attn_mask=seen
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads", list(HEADS.values()), ids=HEADS)
@pytest.mark.parametrize(("start", "width"), [(0, 1), (0, 7), (30, 1), (30, 7)])
def test_packed_attention_equals_repeated_keys(heads, window, start, width):
    num_heads, key_heads = heads
    query = random(1, num_heads, width, WIDTH, seed=1)
    keys, values = (random(1, key_heads, start + width, WIDTH, seed=seed) for seed in (2, 3))
    positions = torch.arange(start, start + width)[None]
    mask = packed_mask(positions, range(start + width), num_heads // key_heads, window, torch.float32)
    expected = reference(query, keys, values, start, window)
    torch.testing.assert_close(packed(query, keys, values, mask, None), expected)


def test_a_single_query_needs_no_mask():
    query, keys, values = random(1, 6, 1, WIDTH), random(1, 2, 9, WIDTH), random(1, 2, 9, WIDTH, seed=1)
    torch.testing.assert_close(packed(query, keys, values, None, None), reference(query, keys, values, 8))


def filled(memory, lengths, key_heads):
    """Slots with random pasts; returns the keys and values of each, heads first."""
    pasts = {}
    for slot, length in lengths.items():
        past = tuple(random(1, key_heads, length, WIDTH, seed=10 * slot + i) for i in range(2))
        for held, new in zip(memory.entries(0, slot, length, past), past, strict=True):
            held[:length] = new[0].transpose(0, 1)
        pasts[slot] = past
    return pasts


def memories(key_heads):
    like = torch.zeros(1, key_heads, WIDTH)
    return {
        "growing": GrowingKVCache(1, 600),
        "fixed": FixedKVCache([(like, like)], num_slots=4, capacity=600),
    }


@pytest.mark.parametrize("kind", ["growing", "fixed"])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", list(HEADS.values()), ids=HEADS)
def test_sequences_in_one_row_see_only_their_own_past(kind, heads, window):
    num_heads, key_heads = heads
    memory = memories(key_heads)[kind]
    pasts = filled(memory, {0: 300, 2: 40, 3: 1}, key_heads)
    # Slot 0 goes on from where it was cut, slot 1 is new.
    spans = [
        SequenceSpan(2, 40, 0, 1),
        SequenceSpan(0, 250, 1, 9),
        SequenceSpan(1, 0, 10, 5),
        SequenceSpan(3, 1, 15, 300),
    ]
    query = random(1, num_heads, 315, WIDTH, seed=1)
    new = tuple(random(1, key_heads, 315, WIDTH, seed=seed) for seed in (2, 3))
    past = PackedPast(memory, spans)
    past.update(*new, 0)
    output = past.attend(query, None, window)
    for span in spans:
        rows = slice(span.offset, span.offset + span.length)
        keys, values = (
            torch.cat(
                [*([pasts[span.slot][i][:, :, : span.start]] if span.start else []), new[i][:, :, rows]], 2
            )
            for i in range(2)
        )
        expected = reference(query[:, :, rows], keys, values, span.start, window)
        torch.testing.assert_close(output[:, rows].transpose(1, 2), expected)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", list(HEADS.values()), ids=HEADS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 8), (2, 4), (4, 1)])
def test_rows_of_fixed_shape_see_only_their_own_past(heads, window, rows, width):
    num_heads, key_heads = heads
    memory = memories(key_heads)["fixed"]
    starts = [250, 40, 0, 511][:rows]
    slots = [2, 0, 3, 1][:rows]
    pasts = filled(
        memory, {slot: start for slot, start in zip(slots, starts, strict=True) if start}, key_heads
    )
    query = random(1, num_heads, rows * width, WIDTH, seed=1)
    new = tuple(random(1, key_heads, rows * width, WIDTH, seed=seed) for seed in (2, 3))
    past = FixedShapePast(
        memory, torch.tensor(slots), torch.tensor(starts), GraphShape(rows, width, 520), packed_kernel
    )
    past.update(*new, 0)
    output = past.attend(query, None, window)
    for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        own = slice(row * width, (row + 1) * width)
        keys, values = (
            torch.cat([*([pasts[slot][i]] if start else []), new[i][:, :, own]], 2) for i in range(2)
        )
        expected = reference(query[:, :, own], keys, values, start, window)
        torch.testing.assert_close(output[:, own].transpose(1, 2), expected)


@pytest.mark.parametrize(("rows", "width", "window"), [(1, 1, None), (2, 4, None), (4, 1, 20)])
def test_flash_attention_is_called_as_torch_declares_it(rows, width, window):
    """Types and shapes only: the kernel itself is compared on a GPU (tests/gpu)."""
    with FakeTensorMode():
        like = torch.zeros(1, 2, WIDTH)
        memory = FixedKVCache([(like, like)], num_slots=4, capacity=600)
        slots, starts = torch.arange(rows), torch.arange(rows) * 100
        past = FixedShapePast(memory, slots, starts, GraphShape(rows, width, 512), flash_kernel)
        new = torch.zeros(1, 2, rows * width, WIDTH)
        past.update(new, new, 0)
        output = past.attend(torch.zeros(1, 6, rows * width, WIDTH), 0.25, window)
        assert output.shape == (1, rows * width, 6, WIDTH)


def test_flash_attention_is_told_where_each_sequence_begins_and_ends():
    memory = memories(2)["fixed"]
    slots, starts = torch.tensor([2, 0]), torch.tensor([250, 40])
    past = FixedShapePast(memory, slots, starts, GraphShape(2, 32, 512), flash_kernel)
    queries, keys, num_keys, num_queries = past.limits
    assert queries.tolist() == [0, 32, 64]
    assert keys[:2].tolist() == [1200, 0]
    assert num_keys.tolist() == [282, 72]
    assert num_queries == 32
    assert {tensor.dtype for tensor in (queries, keys, num_keys)} == {torch.int32}


def test_the_few_queries_of_a_key_are_sequences_of_their_own():
    """So that the kernel spreads them over the device; each sees the keys up to itself."""
    memory = memories(2)["fixed"]
    slots, starts = torch.tensor([2, 0]), torch.tensor([250, 40])
    past = FixedShapePast(memory, slots, starts, GraphShape(2, 4, 252), flash_kernel)
    queries, keys, num_keys, num_queries = past.limits
    assert queries.tolist() == list(range(9))
    assert keys[:8].tolist() == [1200] * 4 + [0] * 4
    # Padding of a pass that is being captured is no reason to read more than the graph's shape says.
    assert num_keys.tolist() == [251, 252, 252, 252, 41, 42, 43, 44]
    assert num_queries == 1


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("heads", list(HEADS.values()), ids=HEADS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 8), (2, 4), (1, 40), (4, 1)])
def test_flash_attention_sees_what_the_plain_kernel_sees(heads, window, rows, width):
    """By FlashAttention's own rules (tests/engine/emulated_cuda.py)."""
    num_heads, key_heads = heads
    memory = memories(key_heads)["fixed"]
    starts, slots = torch.tensor([250, 40, 0, 479][:rows]), torch.tensor([2, 0, 3, 1][:rows])
    filled(memory, dict.fromkeys(range(4), 600), key_heads)
    query = random(1, num_heads, rows * width, WIDTH, seed=1)
    with emulated() as cuda:
        outputs = []
        for kernel in (flash_kernel, packed_kernel):
            past = FixedShapePast(memory, slots, starts, GraphShape(rows, width, 520), kernel)
            outputs.append(kernel(past, query, memory.layers[0], None, window))
        assert cuda.stats["flash"] == 1
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("masked", [False, True])
def test_plain_products_on_cuda_are_as_exact_as_the_fused_kernel(masked):
    """In bf16, against fp32: products that are rounded before the softmax would be ten times as wrong."""
    query = 3 * random(1, 14, 8, 64, seed=1)
    keys, values = (random(1, 2, 700, 64, seed=seed) for seed in (2, 3))
    positions = torch.arange(692, 700)[None]
    mask = packed_mask(positions, range(700), 7, None, torch.float32) if masked else None
    exact = packed(*(t.bfloat16().float() for t in (query, keys, values)), mask, None)
    errors = []
    with emulated():
        for fused in (True, False):
            narrow = [tensor.bfloat16() for tensor in (query, keys, values)]
            half_mask = None if mask is None else mask.bfloat16()
            output = packed(*narrow, half_mask, None, fused=fused)
            errors.append(float((output.float() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0] < 0.01


def test_a_slot_grows_by_doubling_and_keeps_what_it_holds():
    memory = GrowingKVCache(1, 2000)
    like = (torch.zeros(1, 2, 1, WIDTH), torch.zeros(1, 2, 1, WIDTH))
    capacities = []
    for length in (1, 256, 257, 513, 1025, 1999):
        keys, _ = memory.entries(0, 0, length, like)
        keys[length - 1] = length
        capacities.append(len(keys))
    assert capacities == [256, 256, 512, 1024, 2000, 2000]
    assert [float(keys[n - 1, 0, 0]) for n in (1, 256, 257, 513, 1025, 1999)] == [
        1,
        256,
        257,
        513,
        1025,
        1999,
    ]


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_copied_prefix_is_the_copys_own(kind):
    memory = memories(2)[kind]
    pasts = filled(memory, {0: 50}, 2)
    memory.copy(0, 1, 30)
    memory.entries(0, 0, 50)[0].zero_()
    torch.testing.assert_close(memory.entries(0, 1, 30)[0][:30], pasts[0][0][0, :, :30].transpose(0, 1))
