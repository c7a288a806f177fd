"""Where keys and values lie, and the past of a forward pass in them.

In each layer a slot has keys and values, tokens x heads x width; new ones are written behind the old in
place, and read where they lie. What is behind the tokens that were computed is undefined, and is written by
the next pass: to cut a past is to forget a number, and a failed pass leaves no trace. Which tokens a slot
holds is known to `slots`, not here.

On a CPU a slot grows as it is used (`GrowingMemory`). On CUDA all memory is allocated once (`FixedMemory`):
a captured graph knows addresses only. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from midfill.engine.torch.attention import packed, packed_mask
from midfill.engine.torch.graph_shapes import Shape

_BLOCK_TOKENS = 256
"""A slot's memory is a multiple of this many tokens."""

Entries = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer: tokens x heads x width."""


class Memory(Protocol):
    """Keys and values of all slots."""

    def entries(self, layer: int, slot: int, length: int, like: Entries | None = None) -> Entries:
        """A slot's entries in a layer, with room for `length` tokens.

        `like` has the heads, width, type and device (1 x heads x tokens x width), in case memory must be
        allocated; None if it is there already.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Let `target` begin with the first `length` tokens of `source`."""
        ...

    def drop(self, slots: Sequence[int]) -> None:
        """What these slots hold is not needed any more; free it if that is possible."""
        ...


class GrowingMemory:
    """A slot has its own tensors, which double when they are full."""

    def __init__(self, num_layers: int, context: int) -> None:
        self._num_layers = num_layers
        self._context = context
        self._slots: dict[int, list[Entries | None]] = {}

    def entries(self, layer: int, slot: int, length: int, like: Entries | None = None) -> Entries:
        """See `Memory.entries`."""
        layers = self._slots.setdefault(slot, [None] * self._num_layers)
        held = layers[layer]
        if held is None or held[0].shape[0] < length:
            if held is None and like is None:
                raise AssertionError("a slot with computed tokens has entries in every layer")
            held = layers[layer] = self._grown(held, length, like)
        return held

    def _grown(self, old: Entries | None, length: int, like: Entries | None) -> Entries:
        least = -(-length // _BLOCK_TOKENS) * _BLOCK_TOKENS
        capacity = min(max(least, 0 if old is None else 2 * len(old[0])), max(self._context, length))
        if old is None:
            keys, values = (tensor[0].transpose(0, 1) for tensor in like or ())
        else:
            keys, values = old
        grown = (
            keys.new_empty((capacity, *keys.shape[1:])),
            values.new_empty((capacity, *values.shape[1:])),
        )
        if old is not None:
            for new, held in zip(grown, old, strict=True):
                new[: len(held)] = held
        return grown

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Memory.copy`."""
        for layer in range(self._num_layers):
            held = self.entries(layer, source, length)
            like = (held[0].transpose(0, 1)[None], held[1].transpose(0, 1)[None])
            for new, old in zip(self.entries(layer, target, length, like), held, strict=True):
                new[:length] = old[:length]

    def drop(self, slots: Sequence[int]) -> None:
        """See `Memory.drop`."""
        for slot in slots:
            self._slots.pop(slot, None)


class FixedMemory:
    """One tensor per layer for the keys of all slots, one for the values.

    Attributes:
        capacity: how many tokens a slot has room for.
        layers: keys and values of each layer, slots x tokens x heads x width.
    """

    def __init__(self, like: Sequence[Entries], num_slots: int, capacity: int) -> None:
        """Allocate; `like` has the shapes of each layer, from a slot of any other memory.

        Raises torch's out-of-memory error.
        """
        self.capacity = capacity
        self.layers: list[Entries] = [
            (
                # Zeros, for a masked key must at least be finite.
                keys.new_zeros((num_slots, capacity, *keys.shape[1:])),
                values.new_zeros((num_slots, capacity, *values.shape[1:])),
            )
            for keys, values in like
        ]

    def entries(self, layer: int, slot: int, length: int, like: Entries | None = None) -> Entries:  # noqa: ARG002
        """See `Memory.entries`."""
        keys, values = self.layers[layer]
        return keys[slot], values[slot]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Memory.copy`."""
        for tensors in self.layers:
            for tensor in tensors:
                tensor[target, :length] = tensor[source, :length]

    def drop(self, slots: Sequence[int]) -> None:
        """Nothing can be freed."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a pass.

    Attributes:
        slot: where their keys and values go.
        start: how many tokens precede them.
        offset: where they begin in the pass's row of tokens.
        length: how many there are.
    """

    slot: int
    start: int
    offset: int
    length: int


class Spans:
    """The past of a pass with any number of sequences and tokens; nothing is padded.

    The projections see all tokens as one row. Attention goes from sequence to sequence.
    """

    def __init__(self, memory: Memory, spans: Sequence[Span]) -> None:
        self._memory = memory
        self._spans = spans
        self._layer: list[Entries] = []
        self._masks: dict[tuple[Span, int | None], torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002 - some architectures pass more; plain attention needs none of it
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `attention.Past.update`."""
        self._layer = []
        for span in self._spans:
            end = span.start + span.length
            keys, values = self._memory.entries(layer_idx, span.slot, end, (key_states, value_states))
            rows = slice(span.offset, span.offset + span.length)
            keys[span.start : end] = key_states[0, :, rows].transpose(0, 1)
            values[span.start : end] = value_states[0, :, rows].transpose(0, 1)
            self._layer.append((keys, values))
        return key_states, value_states

    def attend(self, query: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
        """See `attention.Past.attend`."""
        outputs = [
            self._attend(span, query[:, :, span.offset : span.offset + span.length], entries, scale, window)
            for span, entries in zip(self._spans, self._layer, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend(
        self, span: Span, query: torch.Tensor, entries: Entries, scale: float | None, window: int | None
    ) -> torch.Tensor:
        end = span.start + span.length
        first = 0 if window is None else max(0, span.start + 1 - window)
        keys, values = (tensor[first:end].transpose(0, 1)[None] for tensor in entries)
        mask = None
        if span.length > 1:
            key = (span, window)
            if key not in self._masks:
                positions = torch.arange(span.start, end, device=query.device)[None]
                groups = query.shape[1] // keys.shape[1]
                self._masks[key] = packed_mask(positions, range(first, end), groups, window, query.dtype)
            mask = self._masks[key]
        return packed(query, keys, values, mask, scale).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - what a cache is asked
        """Not used: positions are given."""
        return 0


Kernel = Callable[["Rows", torch.Tensor, Entries, float | None, int | None], torch.Tensor]
"""Attention of a pass of fixed shape: the arguments and result of `attention.Past.attend`, and the entries of
all slots."""


class Rows:
    """The past of a pass of fixed shape, for capture: as many tokens of each sequence.

    Slots and starts are tensors, so a captured pass serves any slot and any length up to its own. Rows
    that are too short are padded at their end: the padding writes behind the row's tokens, where
    nothing is defined, and no token sees it.

    Attributes:
        slots: rows.
        positions: rows x width; where each token stands.
        num_keys: how many entries of each slot are read at most.
    """

    def __init__(
        self,
        memory: FixedMemory,
        slots: torch.Tensor,
        starts: torch.Tensor,
        shape: Shape,
        kernel: Kernel,
    ) -> None:
        self.slots = slots
        self._ends = starts + shape.width
        self.positions = starts[:, None] + torch.arange(shape.width, device=starts.device)
        self.num_keys = shape.keys
        self._memory = memory
        self._kernel = kernel
        self._index = (slots[:, None] * memory.capacity + self.positions).flatten()
        self._layer = 0
        self._masks: dict[int | None, torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,  # noqa: ARG002 - see Spans.update
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `attention.Past.update`."""
        self._layer = layer_idx
        for held, new in zip(self._memory.layers[layer_idx], (key_states, value_states), strict=True):
            held.flatten(0, 1).index_copy_(0, self._index, new[0].transpose(0, 1))
        return key_states, value_states

    def attend(self, query: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
        """See `attention.Past.attend`."""
        return self._kernel(self, query, self._memory.layers[self._layer], scale, window)

    def mask(self, groups: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """See `attention.packed_mask`; made once for all layers."""
        if window not in self._masks:
            self._masks[window] = packed_mask(self.positions, range(self.num_keys), groups, window, dtype)
        return self._masks[window]

    @cached_property
    def limits(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a kernel that takes all slots as one row of keys, in int32.

        Where the queries of each row begin, and end; where its keys begin; how many there are.
        """
        num_rows, width = self.positions.shape
        first_keys = self.slots * self._memory.capacity
        return (
            torch.arange(0, (num_rows + 1) * width, width, dtype=torch.int32, device=self.slots.device),
            # One more, as the kernel wants it. Only the beginnings count.
            torch.cat([first_keys, first_keys[-1:] + self._memory.capacity]).int(),
            self._ends.int(),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - what a cache is asked
        """Not used: positions are given."""
        return 0


def packed_rows(
    rows: Rows, query: torch.Tensor, entries: Entries, scale: float | None, window: int | None
) -> torch.Tensor:
    """`Kernel` in plain operations: reads `num_keys` entries, masked. For any device."""
    num_rows, width = rows.positions.shape
    heads, depth = query.shape[1], query.shape[3]
    keys, values = (
        tensor[:, : rows.num_keys].transpose(1, 2).index_select(0, rows.slots) for tensor in entries
    )
    query = query.view(heads, num_rows, width, depth).transpose(0, 1)
    output = packed(query, keys, values, rows.mask(heads // keys.shape[1], window, query.dtype), scale)
    return output.transpose(1, 2).reshape(1, num_rows * width, heads, -1)


def flash_rows(
    rows: Rows, query: torch.Tensor, entries: Entries, scale: float | None, window: int | None
) -> torch.Tensor:
    """`Kernel` with torch's flash attention: reads what there is, where it lies. CUDA only."""
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - only where it can run

    width = rows.positions.shape[1]
    # A single query sees all keys. To say so lets the kernel pack heads and split keys over the device.
    left, right = (-1, -1) if width == 1 else (-1, 0)
    if window is not None:
        left, right = window - 1, 0
    first_queries, first_keys, num_keys = rows.limits
    output = varlen_attn(
        query[0].transpose(0, 1),
        entries[0].flatten(0, 1),
        entries[1].flatten(0, 1),
        first_queries,
        first_keys,
        width,
        rows.num_keys,
        scale=scale,
        window_size=(left, right),
        enable_gqa=True,
        seqused_k=num_keys,
    )
    if not isinstance(output, torch.Tensor):
        raise TypeError("varlen_attn gave more than the output")
    return output[None]
