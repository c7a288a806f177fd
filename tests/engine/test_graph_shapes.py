"""Which captured pass serves a step, and what is captured when: integers only."""

from __future__ import annotations

import pytest

from midfill.engine.torch import graph_shapes
from midfill.engine.torch.graph_shapes import GraphCache, GraphShape

LONGEST = 8192 + 512


class Captures:
    """Captures shapes by name; raises what it is told to."""

    def __init__(self, room=1000):
        self.shapes = []
        self.room = room
        self.error = None
        self.fits = lambda _shape: True
        self.now_s = 0.0

    def capture(self, shape):
        if self.error is not None:
            raise self.error
        if not self.fits(shape):
            raise MemoryError
        self.shapes.append(shape)
        return str(shape)

    def has_room(self):
        return len(self.shapes) < self.room


def make(**options):
    captures = Captures(**options)
    return captures, GraphCache(LONGEST, captures.capture, captures.has_room, lambda: captures.now_s)


def wanted(found, rows, width, end, *, head=True):
    return found.find(found.shape(rows, width, end, head=head))


@pytest.mark.parametrize(
    ("end", "keys"), [(1, 256), (256, 256), (257, 512), (2048, 2048), (2049, 4096), (8193, LONGEST)]
)
def test_the_keys_that_are_read_are_bounded_by_a_bucket(end, keys):
    _, found = make()
    assert found.shape(1, 1, end, head=True).keys == keys


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([1], (1, 1)),
        ([2], (1, 4)),
        ([5], (1, 8)),
        ([17], (1, 32)),
        ([64], (1, 64)),
        ([65], (1, 128)),
        ([512], (1, 512)),
        ([513], None),
        ([1, 1], (2, 1)),
        ([1, 1, 1], (4, 1)),
        ([16, 1, 1, 3], (4, 16)),
        ([17, 1, 1], None),
        ([1] * 5, None),
    ],
)
def test_chunks_are_padded_to_the_next_rows_and_width(lengths, size):
    assert graph_shapes.fit(lengths) == size


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([1], [[0]]),
        ([1, 1, 1, 1], [[0, 1, 2, 3]]),
        ([1, 1, 1, 1, 1], [[0, 1, 2, 3], [4]]),
        ([512, 1, 1], [[0], [1, 2]]),
        ([1, 512, 1], [[0], [1], [2]]),
        ([600, 1], [[0], [1]]),
    ],
)
def test_short_chunks_share_a_pass_and_long_ones_have_their_own(lengths, expected):
    assert graph_shapes.groups(lengths) == expected


def test_the_first_captures_serve_every_step_of_one_sequence():
    _, found = make()
    for _ in range(len(graph_shapes.WIDTHS) + 1):
        assert found.capture_next()
    for end in (1, 300, 8192):
        for width in graph_shapes.WIDTHS:
            shape, _ = wanted(found, 1, width, end)
            assert (shape.width, shape.keys) == (width, LONGEST)
    shape, _ = wanted(found, 1, 512, 8192, head=False)
    assert not shape.head


def test_the_cheapest_captured_pass_is_chosen():
    captures, found = make()
    while found.capture_next():
        pass
    assert len(set(captures.shapes)) == len(captures.shapes) == len(found)
    for rows, width, end in [(1, 1, 100), (1, 8, 1000), (2, 1, 3000), (4, 16, 50), (1, 512, 512)]:
        shape, captured = wanted(found, rows, width, end)
        assert shape.serves(GraphShape(rows, width, end))
        assert captured == str(shape)
        assert not [
            other
            for other in captures.shapes
            if other.serves(GraphShape(rows, width, end)) and other.cost < shape.cost
        ]


def test_nothing_captured_serves_nothing():
    _, found = make()
    assert wanted(found, 1, 1, 10) is None


def test_what_was_missed_is_captured_next():
    captures, found = make()
    found.capture_next()
    assert wanted(found, 2, 1, 100) is None
    assert wanted(found, 1, 1, 100)[0].keys == LONGEST
    found.capture_next()
    found.capture_next()
    assert captures.shapes[1:] == [GraphShape(1, 1, 256), GraphShape(2, 1, 256)]
    assert wanted(found, 2, 1, 100)[0] == GraphShape(2, 1, 256)


def test_without_room_nothing_more_is_captured_for_a_while():
    captures, found = make(room=3)
    while found.capture_next():
        pass
    assert len(found) == len(captures.shapes) == 3
    assert wanted(found, 1, 1, 10) is not None
    captures.room = 5
    assert not found.capture_next()
    captures.now_s += graph_shapes.RETRY_S
    while found.capture_next():
        pass
    assert len(found) == 5


def test_a_model_that_cannot_be_captured_runs_without_graphs(caplog):
    captures, found = make()
    found.capture_next()
    captures.error = RuntimeError("operation not permitted when stream is capturing")
    assert not found.capture_next()
    captures.error = None
    captures.now_s += graph_shapes.RETRY_S
    assert not found.capture_next()
    found.restart()
    assert not found.capture_next()
    assert len(found) == 0
    assert "runs without graphs" in caplog.text


def test_what_does_not_fit_is_skipped_and_the_rest_is_captured():
    """The widest passes over the longest past need most; all others still have a graph."""
    captures, found = make()
    too_large = GraphShape(1, 256, LONGEST)
    captures.fits = lambda shape: not shape.serves(too_large)
    while found.capture_next():
        pass
    missing = [shape for shape in graph_shapes.likely(LONGEST) if shape not in captures.shapes]
    assert missing == [shape for shape in graph_shapes.likely(LONGEST) if shape.serves(too_large)]
    assert GraphShape(1, 512, 4096) in captures.shapes
    assert wanted(found, 1, 1, 10)[0].keys == 256
    # Later there is room.
    captures.fits = lambda _shape: True
    assert not found.capture_next()
    captures.now_s += graph_shapes.RETRY_S
    while found.capture_next():
        pass
    assert set(captures.shapes) == set(graph_shapes.likely(LONGEST))


def test_out_of_memory_in_a_pass_keeps_the_graphs():
    captures, found = make()
    found.capture_next()
    found.pause()
    assert not found.capture_next()
    assert wanted(found, 1, 1, 10) is not None
    captures.now_s += graph_shapes.RETRY_S
    assert found.capture_next()


def test_graphs_that_are_discarded_are_captured_again_only_after_a_restart():
    _, found = make()
    while not found.serves_every_step:
        assert found.capture_next()
    assert len(found) == len(graph_shapes.WIDTHS) + 3
    found.clear()
    assert (len(found), found.num_waiting, found.capture_next()) == (0, 0, False)
    assert wanted(found, 1, 1, 10) is None
    found.restart()
    assert found.capture_next()
    assert wanted(found, 1, 1, 10) is not None


@pytest.mark.parametrize(
    ("free_gb", "expected"),
    [(100, 32768), (10, 32768), (2, 8192), (0.2, 1024)],
)
def test_slots_have_room_for_the_context_or_for_what_fits_into_a_third_of_the_memory(free_gb, expected):
    # 12 KB a token and 4 slots, as the 0.5b has.
    assert graph_shapes.capacity(32768, 12_288, 4, int(free_gb * 2**30)) == expected


@pytest.mark.parametrize(
    ("free_gb", "prompt_tokens", "expected"),
    [
        (100, 704, 32768),  # all of it fits into an eighth
        (6, 704, 16384),
        (4, 704, 8192),
        (4, 12_000, 16384),  # what the settings ask for counts
        (2, 704, 8192),
        (1, 704, 4096),
        (1, 8192, 8192),  # more than a third, but less than two
        (0.5, 8192, 2048),
        (0.05, 704, 256),
    ],
)
def test_where_memory_is_small_slots_have_room_for_the_prompts(free_gb, prompt_tokens, expected):
    free = int(free_gb * 2**30)
    assert graph_shapes.capacity(32768, 12_288, 4, free, prompt_tokens) == expected


@pytest.mark.parametrize(
    ("prompt_tokens", "expected"), [(0, 256), (1, 256), (256, 256), (257, 512), (704, 1024), (9000, 8192)]
)
def test_a_slot_has_room_for_a_prompt_in_the_smallest_bucket(prompt_tokens, expected):
    assert graph_shapes.slot_tokens(8192, prompt_tokens) == expected


def test_no_room_for_slots_at_all():
    with pytest.raises(MemoryError, match="4 slots"):
        graph_shapes.capacity(32768, 12_288, 4, 1 << 20)
