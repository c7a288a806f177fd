"""The memory that a model takes on a GPU, before it is loaded: choose the format, or say what would fit.

Works on numbers from a model's files or from the catalogue; runs no model, imports no torch. Any thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from midfill.adapters.format import layers_of
from midfill.engine.api import MAX_ADAPTERS
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.torch import graph_shapes
from midfill.models import catalogue
from midfill.models.catalogue import Entry
from midfill.models.safetensors_io import find_tensors, shapes_of
from midfill.models.store import read_config

GROUP = 64
"""Weights that share a scale and an offset in the 4-bit format."""

RESERVE_BYTES = 1 << 30
"""Memory left free for passes that are not captured and for other programs, as `cuda` leaves it."""

_GRAPH_BYTES = 1 << 27
"""For the graphs that matter most. Not measured."""

_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_LINEAR_BYTES = {"int8": 1.0, "int4": 0.5 + 4 / GROUP}
_RANK = 16
"""Of the adapters that are expected."""

_COMMON_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Size:
    """The numbers of a model that its memory follows from.

    Attributes:
        weights: all weights.
        embedding: those of the embedding: vocabulary x width.
        tied: the head has the embedding's weights.
        kv_values: keys and values of one token, in all layers.
        context: maximum number of tokens of one sequence.
        heads: query heads.
        lora_width: inputs and outputs of all linear layers; 0 if not known.
    """

    weights: int
    embedding: int
    tied: bool
    kv_values: int
    context: int
    heads: int = 32
    lora_width: int = 0

    def weight_bytes(self, dtype: str) -> float:
        """Return the memory of the weights. With 8 and 4 bits the head is a copy, and the embedding has 8."""
        if dtype in _BYTES:
            return self.weights * _BYTES[dtype]
        linear = self.weights if self.tied else self.weights - self.embedding
        return linear * _LINEAR_BYTES[dtype] + self.embedding

    def token_bytes(self, dtype: str) -> int:
        """Return the memory of one token's keys and values."""
        return self.kv_values * (4 if dtype == "float32" else 2)


def size_of(model: Path) -> Size:
    """Return the size of the model of a folder. Raises `ModelError` if it holds none."""
    config = read_config(model)
    shapes = shapes_of(find_tensors(model))
    weights = sum(_product(shape) for shape in shapes.values())
    rows = config.get("vocab_size") or 0
    matrices = [shape for shape in shapes.values() if len(shape) == 2 and shape[0] == rows]
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    width = config.get("hidden_size") or config.get("n_embd") or 0
    depth = config.get("num_hidden_layers") or config.get("n_layer") or 1
    key_heads = config.get("num_key_value_heads") or (1 if config.get("multi_query") else heads)
    return Size(
        weights=weights,
        embedding=_product(matrices[0]) if matrices else 0,
        tied=len(matrices) < 2,
        kv_values=2 * depth * key_heads * (config.get("head_dim") or width // heads),
        context=config.get("max_position_embeddings") or config.get("n_positions") or _COMMON_CONTEXT,
        heads=heads,
        lora_width=sum(out + into for out, into in layers_of(model).values()),
    )


def size_in_catalogue(entry: Entry) -> Size | None:
    """Return the size of a model of the catalogue, or None if the catalogue does not have its numbers."""
    if not entry.kv_values:
        return None
    return Size(entry.parameters, entry.embedding, entry.tied, entry.kv_values, entry.context)


def _product(shape: Sequence[int]) -> int:
    result = 1
    for one in shape:
        result *= one
    return result


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that a model takes, in bytes.

    Attributes:
        weights: of the model.
        kv: keys and values of all slots.
        passes: captured graphs, and the products of queries and keys.
        adapters: low-rank matrices.
        slot_tokens: tokens that each slot has room for.
    """

    weights: float
    kv: float
    passes: float
    adapters: float
    slot_tokens: int

    @property
    def total(self) -> float:
        """All of it, and the reserve."""
        return self.weights + self.kv + self.passes + self.adapters + RESERVE_BYTES


def need(
    size: Size,
    dtype: str,
    prompt_tokens: int,
    *,
    chunk_tokens: int = 512,
    flash: bool = True,
    adapters: bool = False,
) -> Need:
    """Return what a model needs at least.

    Args:
        size: the model's.
        dtype: the format of its weights.
        prompt_tokens: the longest prompt with its output; a slot has room for no less.
        chunk_tokens: tokens per pass.
        flash: attention takes no memory for the products of queries and keys.
        adapters: whether adapters are expected.
    """
    slot_tokens = graph_shapes.slot_tokens(size.context, prompt_tokens)
    products = 0 if flash else 10 * size.heads * chunk_tokens * slot_tokens
    return Need(
        weights=size.weight_bytes(dtype),
        kv=NUM_SLOTS * (slot_tokens + graph_shapes.WIDTHS[-1]) * size.token_bytes(dtype),
        passes=_GRAPH_BYTES + products,
        adapters=2 * MAX_ADAPTERS * _RANK * size.lora_width * adapters,
        slot_tokens=slot_tokens,
    )


def first_that_fits(needs: Mapping[str, Need], free: float) -> str | None:
    """Return the first format whose need is free, or None."""
    return next((dtype for dtype, one in needs.items() if one.total <= free), None)


def largest_that_fits(
    dtypes: Sequence[str], free: float, prompt_tokens: int, family: str | None = None
) -> tuple[str, str] | None:
    """Return the largest model of the catalogue that fits into free memory, and its format, or None.

    One of this family is preferred; of another family one that needs no login.
    """

    def preference(entry: Entry) -> tuple[bool, bool, int]:
        same = entry.family == family
        return same, same or not entry.gated, entry.parameters

    for entry in sorted(catalogue.entries().values(), key=preference, reverse=True):
        if (size := size_in_catalogue(entry)) is None:
            continue
        needs = {dtype: need(size, dtype, prompt_tokens) for dtype in dtypes}
        if (dtype := first_that_fits(needs, free)) is not None:
            return entry.name, dtype
    return None


def refusal(
    name: str, device: str, needs: Mapping[str, Need], free: float, instead: tuple[str, str] | None
) -> str:
    """Return one sentence on a model that does not fit, and on one that would."""
    dtype, least = min(needs.items(), key=lambda item: item[1].total)
    said = (
        f"{name} needs {least.total / 1e9:.1f} GB of the {device}'s memory in {dtype}, with its keys and "
        f"values and 1 GB for other programs, and {free / 1e9:.1f} GB are free"
    )
    if instead is None:
        return f"{said}; no model of the catalogue fits. Close other programs, or set device to cpu."
    other, dtype = instead
    if other == name:
        return f"{said}; it would fit in {dtype}. Set dtype to auto."
    return (
        f"{said}; {other} would fit ({dtype}). Run: midfill model pull {other} && midfill model use {other}"
    )
