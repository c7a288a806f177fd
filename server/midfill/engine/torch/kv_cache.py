"""Store keys and values, and give a forward pass its view of them.

In each layer a slot has keys and values, tokens x heads x width; new ones are written after the old ones in
place, and read where they lie. Entries after the computed tokens are undefined and overwritten by the next
pass: cutting a past means forgetting a number, and a failed pass leaves no trace. `kv_slots` knows which
tokens a slot holds, this module does not.

On a CPU a slot grows as it is used (`GrowingKVCache`). On CUDA all memory is allocated once (`FixedKVCache`),
because a captured graph knows fixed addresses only. Runs on the engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch

from midfill.engine.torch.attention import packed, packed_mask
from midfill.engine.torch.graph_shapes import GraphShape

_BLOCK_TOKENS = 256
"""A slot's memory is a multiple of this many tokens."""

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer: tokens x heads x width."""


class KVCache(Protocol):
    """Keys and values of all slots."""

    def entries(self, layer: int, slot: int, length: int, like: LayerKV | None = None) -> LayerKV:
        """Return a slot's keys and values in a layer, with room for `length` tokens.

        `like` has the heads, width, type and device (1 x heads x tokens x width), in case memory must be
        allocated; None if it is allocated already.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of `source` to the beginning of `target`."""
        ...

    def drop(self, slots: Sequence[int]) -> None:
        """Discard the contents of these slots; free their memory if possible."""
        ...


class GrowingKVCache:
    """Each slot has its own tensors, which double when they are full."""

    def __init__(self, num_layers: int, context: int) -> None:
        self._num_layers = num_layers
        self._context = context
        self._slots: dict[int, list[LayerKV | None]] = {}

    def entries(self, layer: int, slot: int, length: int, like: LayerKV | None = None) -> LayerKV:
        """Return a slot's keys and values in a layer; allocate or grow them if needed."""
        layers = self._slots.setdefault(slot, [None] * self._num_layers)
        held = layers[layer]
        if held is None or held[0].shape[0] < length:
            if held is None and like is None:
                raise AssertionError("a slot with computed tokens has entries in every layer")
            held = layers[layer] = self._grown(held, length, like)
        return held

    def _grown(self, old: LayerKV | None, length: int, like: LayerKV | None) -> LayerKV:
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
        """Copy the first `length` tokens of `source` to the beginning of `target`."""
        for layer in range(self._num_layers):
            held = self.entries(layer, source, length)
            like = (held[0].transpose(0, 1)[None], held[1].transpose(0, 1)[None])
            for new, old in zip(self.entries(layer, target, length, like), held, strict=True):
                new[:length] = old[:length]

    def drop(self, slots: Sequence[int]) -> None:
        """Free the memory of these slots."""
        for slot in slots:
            self._slots.pop(slot, None)


class FixedKVCache:
    """One tensor per layer for the keys of all slots, one for the values.

    Attributes:
        capacity: number of tokens that a slot has room for.
        layers: keys and values of each layer, slots x tokens x heads x width.
    """

    def __init__(self, like: Sequence[LayerKV], num_slots: int, capacity: int) -> None:
        """Allocate all memory; `like` has the shapes of each layer, from a slot of any other cache.

        Raises torch's out-of-memory error.
        """
        self.capacity = capacity
        self.layers: list[LayerKV] = [
            (
                # Zeros, because even a masked key must be finite.
                keys.new_zeros((num_slots, capacity, *keys.shape[1:])),
                values.new_zeros((num_slots, capacity, *values.shape[1:])),
            )
            for keys, values in like
        ]

    def entries(self, layer: int, slot: int, length: int, like: LayerKV | None = None) -> LayerKV:
        """Return views of a slot's keys and values in a layer."""
        keys, values = self.layers[layer]
        return keys[slot], values[slot]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of `source` to the beginning of `target`."""
        for tensors in self.layers:
            for tensor in tensors:
                tensor[target, :length] = tensor[source, :length]

    def drop(self, slots: Sequence[int]) -> None:
        """Do nothing: the memory is allocated once."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """Tokens of one sequence in a pass.

    Attributes:
        slot: where their keys and values go.
        start: number of tokens that precede them.
        offset: index of the first of them in the pass's row of tokens.
        length: number of tokens.
    """

    slot: int
    start: int
    offset: int
    length: int


class PackedPast:
    """The past of a pass with any number of sequences and tokens, without padding.

    The projections see all tokens as one row. Attention is computed for one sequence after the other.
    """

    def __init__(self, cache: KVCache, spans: Sequence[SequenceSpan], *, fused: bool = True) -> None:
        """Take the sequences of a pass; for `fused` see `attention.packed`."""
        self._cache = cache
        self._spans = spans
        self._fused = fused
        self._layer: list[LayerKV] = []
        self._masks: dict[tuple[SequenceSpan, int | None], torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values; see `attention.Past.update`."""
        self._layer = []
        for span in self._spans:
            end = span.start + span.length
            keys, values = self._cache.entries(layer_idx, span.slot, end, (key_states, value_states))
            rows = slice(span.offset, span.offset + span.length)
            keys[span.start : end] = key_states[0, :, rows].transpose(0, 1)
            values[span.start : end] = value_states[0, :, rows].transpose(0, 1)
            self._layer.append((keys, values))
        return key_states, value_states

    def attend(self, query: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
        """Return the attention in the layer updated last; see `attention.Past.attend`."""
        outputs = [
            self._attend(span, query[:, :, span.offset : span.offset + span.length], entries, scale, window)
            for span, entries in zip(self._spans, self._layer, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _attend(
        self,
        span: SequenceSpan,
        query: torch.Tensor,
        entries: LayerKV,
        scale: float | None,
        window: int | None,
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
        return packed(query, keys, values, mask, scale, fused=self._fused).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0; not used, because positions are given."""
        return 0


Kernel = Callable[["FixedShapePast", torch.Tensor, LayerKV, float | None, int | None], torch.Tensor]
"""Attention of a pass of fixed shape.

The arguments and result of `attention.Past.attend`, and the keys and values of all slots.
"""


_SINGLE_QUERIES = 16
"""Up to this many tokens per row each query is a sequence of its own for flash attention.

With several queries per sequence the kernel neither packs heads nor splits keys: a few blocks of threads then
read all keys, one after another.
"""


class _Limits(NamedTuple):
    """The sequences of a pass for flash attention.

    Attributes:
        first_queries: index of the first query of each sequence, and the number of all queries.
        first_keys: index of the first key of each sequence, and one more.
        num_keys: number of keys of each sequence.
        num_queries: queries per sequence.
    """

    first_queries: torch.Tensor
    first_keys: torch.Tensor
    num_keys: torch.Tensor
    num_queries: int


class FixedShapePast:
    """The past of a captured pass: a fixed number of rows with equally many tokens each.

    Slots and starts are tensors, so a captured pass serves any slot and any length up to its own. Rows that
    are too short are padded at their end: padding writes after the row's tokens, where nothing is defined,
    and no token sees it.

    Attributes:
        slots: one per row.
        positions: rows x width; the position of each token.
        num_keys: maximum number of entries that are read of each slot.
    """

    def __init__(
        self,
        cache: FixedKVCache,
        slots: torch.Tensor,
        starts: torch.Tensor,
        shape: GraphShape,
        kernel: Kernel,
    ) -> None:
        self.slots = slots
        self._ends = starts + shape.width
        self.positions = starts[:, None] + torch.arange(shape.width, device=starts.device)
        self.num_keys = shape.keys
        self._cache = cache
        self._kernel = kernel
        self._index = (slots[:, None] * cache.capacity + self.positions).flatten()
        self._layer = 0
        self._masks: dict[int | None, torch.Tensor] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values; see `attention.Past.update`."""
        self._layer = layer_idx
        for held, new in zip(self._cache.layers[layer_idx], (key_states, value_states), strict=True):
            held.flatten(0, 1).index_copy_(0, self._index, new[0].transpose(0, 1))
        return key_states, value_states

    def attend(self, query: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
        """Return the attention in the layer updated last; see `attention.Past.attend`."""
        return self._kernel(self, query, self._cache.layers[self._layer], scale, window)

    def mask(self, groups: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return `attention.packed_mask`, computed once for all layers."""
        if window not in self._masks:
            self._masks[window] = packed_mask(self.positions, range(self.num_keys), groups, window, dtype)
        return self._masks[window]

    @cached_property
    def limits(self) -> _Limits:
        """Offsets, in int32, for a kernel that takes all slots as one row of keys."""
        num_rows, width = self.positions.shape
        first_keys = self.slots * self._cache.capacity
        ends = self._ends
        if width <= _SINGLE_QUERIES:
            # Each query is a sequence: so the kernel packs heads and splits keys over the device.
            first_keys = first_keys[:, None].expand(-1, width).flatten()
            ends = self.positions.flatten() + 1
            num_rows, width = num_rows * width, 1
        device = self.slots.device
        return _Limits(
            torch.arange(0, (num_rows + 1) * width, width, dtype=torch.int32, device=device),
            # One more, as the kernel requires. Only the beginnings count.
            torch.cat([first_keys, first_keys[-1:] + self._cache.capacity]).int(),
            # A pass that is being captured lies after the context, which a shorter graph does not read.
            ends.clamp(max=self.num_keys).int(),
            width,
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0; not used, because positions are given."""
        return 0


def packed_kernel(
    rows: FixedShapePast, query: torch.Tensor, entries: LayerKV, scale: float | None, window: int | None
) -> torch.Tensor:
    """`Kernel` in plain operations, for any device: reads `num_keys` entries, masked."""
    num_rows, width = rows.positions.shape
    heads, depth = query.shape[1], query.shape[3]
    keys, values = (
        tensor[:, : rows.num_keys].transpose(1, 2).index_select(0, rows.slots) for tensor in entries
    )
    query = query.view(heads, num_rows, width, depth).transpose(0, 1)
    mask = rows.mask(heads // keys.shape[1], window, query.dtype)
    output = packed(query, keys, values, mask, scale, fused=False)
    return output.transpose(1, 2).reshape(1, num_rows * width, heads, -1)


def flash_kernel(
    rows: FixedShapePast, query: torch.Tensor, entries: LayerKV, scale: float | None, window: int | None
) -> torch.Tensor:
    """`Kernel` with torch's flash attention, on CUDA only: reads the entries in place.

    Calls the operation that torch's `varlen_attn` wraps. The wrapper adds a kernel per layer, and its
    arguments are not the same in all versions of torch.
    """
    limits = rows.limits
    # A single query sees all keys of its sequence. Saying so lets the kernel pack heads and split keys.
    causal = window is None and limits.num_queries > 1
    left, right = (-1, 0 if causal else -1) if window is None else (window - 1, 0)
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - it has no public name
        query[0].transpose(0, 1),
        entries[0].flatten(0, 1),
        entries[1].flatten(0, 1),
        limits.first_queries,
        limits.first_keys,
        limits.num_queries,
        rows.num_keys,
        0.0,  # no dropout
        causal,
        False,  # no debug output
        scale=scale,
        window_size_left=left,
        window_size_right=right,
        seqused_k=limits.num_keys,
    )[0]
    return output[None]
