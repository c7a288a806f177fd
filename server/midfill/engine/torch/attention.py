"""Attention over keys and values in slots, for transformers' own modules.

transformers looks up attention functions in a table; ours is registered there under `NAME`, without a mask
function, so that no model builds a mask. A forward pass takes one row of tokens of any number of sequences. A
`Past` object takes the place of a cache: it receives the new keys and values of each layer (`update`) and
then answers the layer's queries (`attend`). So every architecture that uses the table works.

Query heads that share a key head are packed: they become further queries of that one head. Repeating the keys
for them, as transformers does where there is a mask, means writing and reading all keys once per query head.

Knows tensors; nothing of requests. Runs on the engine thread only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from midfill.errors import ModelError

NAME = "midfill"
"""Name of our attention in transformers' table."""

_UNSUPPORTED = ("softcap", "position_bias", "s_aux")
"""Extra inputs of some architectures' attention that ours does not support."""


class Past(Protocol):
    """The tokens of one forward pass and what precedes them."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values (1 x heads x tokens x width). The result is not used."""
        ...

    def attend(self, query: torch.Tensor, scale: float | None, window: int | None) -> torch.Tensor:
        """Return the attention in the layer updated last.

        Args:
            query: 1 x heads x tokens x width.
            scale: factor of the products; None for 1 / sqrt(width).
            window: number of keys that a query sees, itself included; None for all before it.

        Returns:
            1 x tokens x heads x width of the values.
        """
        ...


class _Current(threading.local):
    past: Past | None = None


_CURRENT = _Current()


@contextmanager
def attending(past: Past) -> Iterator[None]:
    """Use `past` for attention in this thread. Not all modules pass on their caller's arguments."""
    _CURRENT.past = past
    try:
        yield
    finally:
        _CURRENT.past = None


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention; called by transformers, see its `AttentionInterface`."""
    if _CURRENT.past is None:
        raise AssertionError("a forward pass runs inside `attending`")
    foreign = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if foreign:
        raise ModelError(
            f"{type(module).__name__} uses attention with {foreign[0]}, which midfill does not support; "
            "choose another model (midfill model list)."
        )
    return _CURRENT.past.attend(query, scaling, sliding_window), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)


def use(model: Any) -> None:
    """Make a transformers model use this module's attention.

    Raises:
        ModelError: its modules do not use the table.
    """
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:  # noqa: SLF001 - there is no public getter
        raise ModelError(
            f"The attention of {type(model).__name__} cannot be replaced, so its KV cache cannot be reused; "
            "choose another model (midfill model list)."
        )


def packed(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    *,
    fused: bool = True,
) -> torch.Tensor:
    """Return attention with the query heads of each key head packed into the query dimension.

    Args:
        query: batch x heads x queries x width; heads / key heads of them share a key head, in order.
        keys: batch x key heads x length x width; any strides.
        values: batch x key heads x length x width of values.
        mask: added to the products, from `packed_mask`; None if every query sees every key.
        scale: factor of the products; None for 1 / sqrt(width).
        fused: use torch's fused kernel, as everywhere but on CUDA. There a fused kernel with a mask gives
            each key head to one block of threads, and there are only one or two heads; plain products are
            spread over the whole device.

    Returns:
        batch x heads x queries x width of values.
    """
    batch, heads, num_queries, width = query.shape
    key_heads = keys.shape[1]
    groups = query.reshape(batch, key_heads, heads // key_heads * num_queries, width)
    if fused:
        output = functional.scaled_dot_product_attention(groups, keys, values, attn_mask=mask, scale=scale)
    else:
        # In fp32 up to the weights, as flash attention does: the softmax enlarges errors of its input.
        products = _products(groups, keys.transpose(2, 3))
        products *= width**-0.5 if scale is None else scale
        if mask is not None:
            products += mask
        output = torch.matmul(products.softmax(dim=-1).to(values.dtype), values)
    return output.reshape(batch, heads, num_queries, values.shape[-1])


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the fp32 product of two batches of matrices, batch x heads x rows x columns."""
    if left.dtype == torch.float32:
        return torch.matmul(left, right)
    # Only CUDA has this argument; without it the products are rounded to the type of the inputs.
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out_dtype=torch.float32)
    return product.view(*left.shape[:2], *product.shape[1:])


def packed_mask(
    positions: torch.Tensor, keys: range, groups: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return the mask for `packed`: a query sees no key after it, and none that has left the window.

    Args:
        positions: batch x queries, the position of each query in its sequence.
        keys: the positions of the keys.
        groups: query heads per key head.
        window: see `Past.attend`.
        dtype: that of the queries.

    Returns:
        batch x 1 x (groups * queries) x keys: 0 or the smallest number.
    """
    key_positions = torch.arange(keys.start, keys.stop, device=positions.device)
    queries = positions[..., None]
    hidden = key_positions > queries
    if window is not None:
        hidden |= key_positions <= queries - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    mask.masked_fill_(hidden, torch.finfo(dtype).min)
    return mask.repeat(1, groups, 1)[:, None]
