"""Layers with 8-bit or 4-bit weights and 16-bit (or float32) activations, for GPUs.

With 4 bits, groups of `GROUP` weights of a row share a scale and an offset: weight ~ (code - 8) * scale +
offset. That is the layout of torch's own packed products, which are used where the device has them and where
they agree with plain operations. Elsewhere, and for 8 bits (a row has one scale), the weights are expanded
block by block just before their product: the memory of 4 bits, at a speed below that of 16 bits.

Every operation has a fixed shape and reads nothing on the host, so that passes can be captured. Knows
weights, not models. Runs on the engine thread and, while a model loads, on loader threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from midfill.engine.torch.memory import GROUP
from midfill.engine.torch.quantize import Int8Weight

_LOG = logging.getLogger(__name__)

_BLOCK_ELEMENTS = 1 << 24
"""Weights that are expanded at a time: 32 MB in 16 bits."""

_MIDDLE = 8
_HIGHEST = 15

Product = Callable[[torch.Tensor], torch.Tensor]
"""Inputs (rows x in) to outputs (rows x out)."""


def fits(shape: torch.Size) -> bool:
    """Return whether a weight of this shape (out x in) can have 4 bits."""
    return len(shape) == 2 and shape[1] % GROUP == 0


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A weight (out x in) in 4 bits.

    Attributes:
        codes: uint8, out x in/2; the even columns in the upper four bits.
        scales: in/GROUP x out x 2; scale and offset of each group, in the type of the activations.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, shape: torch.Size, blocks: Iterable[torch.Tensor], dtype: torch.dtype) -> Int4Weight:
        """Quantize a weight that comes in blocks of consecutive rows, of any float type.

        Raises:
            ValueError: a value is not finite.
        """
        num_rows, width = shape
        codes = torch.empty((num_rows, width // 2), dtype=torch.uint8)
        scales = torch.empty((width // GROUP, num_rows, 2), dtype=dtype)
        start = 0
        for block in blocks:
            end = start + len(block)
            groups = block.float().view(len(block), -1, GROUP)
            low, high = torch.aminmax(groups, dim=-1)
            if not bool((high - low).isfinite().all()):
                raise ValueError("the weight has values that are not finite")
            scale = ((high - low) / _HIGHEST).clamp_min_(torch.finfo(torch.float16).tiny).to(dtype)
            offset = (low + _MIDDLE * scale.float()).to(dtype)
            scales[:, start:end, 0], scales[:, start:end, 1] = scale.T, offset.T
            # Round to what the stored scale and offset, not the exact ones, will make of the code.
            found = (groups - offset.float()[..., None]) / scale.float()[..., None] + _MIDDLE
            found = found.round_().clamp_(0, _HIGHEST).to(torch.uint8).view(len(block), width)
            codes[start:end] = found[:, ::2] << 4 | found[:, 1::2]
            start = end
        return cls(codes, scales)

    def to(self, device: torch.device) -> Int4Weight:
        """Return the same weight on a device."""
        return Int4Weight(self.codes.to(device), self.scales.to(device))

    def expanded(self, start: int, end: int) -> torch.Tensor:
        """Return rows `start` to `end`, in the type of the scales."""
        codes = self.codes[start:end]
        both = torch.stack((codes >> 4, codes & _HIGHEST), dim=-1)
        scale, offset = self.scales[:, start:end].unbind(-1)
        groups = both.view(len(codes), -1, GROUP).to(scale.dtype) - _MIDDLE
        # Scaled and shifted with one rounding, as in the packed products.
        torch.addcmul(offset.T[..., None], groups, scale.T[..., None], out=groups)
        return groups.view(len(codes), -1)


class Int4Linear(nn.Linear):
    """A linear layer with 4-bit weights; its `weight` is an empty placeholder.

    Attributes:
        kernel: the product in use: "packed" or "plain".
    """

    def __init__(
        self, weight: Int4Weight, bias: torch.Tensor | None, device: torch.device, *, packed: bool
    ) -> None:
        num_out, num_in = weight.codes.shape[0], weight.codes.shape[1] * 2
        super().__init__(num_in, num_out, bias=False, device="meta")
        self.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        packing = _packing(device, weight) if packed and packed_agrees(device, weight.scales.dtype) else None
        self.kernel = "plain" if packing is None else "packed"
        self._product: Product = _plain_product(weight.to(device)) if packing is None else packing

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product, in the type of the input."""
        output = self._product(input.reshape(-1, self.in_features))
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)


def _plain_product(weight: Int4Weight) -> Product:
    num_rows, width = len(weight.codes), weight.codes.shape[1] * 2
    return lambda rows: _by_blocks(rows, num_rows, width, weight.expanded)


def _by_blocks(
    rows: torch.Tensor, num_out: int, width: int, expanded: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """Return `rows` times a weight of which `expanded(start, end)` gives some rows."""
    step = max(1, _BLOCK_ELEMENTS // width)
    if num_out <= step:
        return functional.linear(rows, expanded(0, num_out))
    result = rows.new_empty(len(rows), num_out)
    for start in range(0, num_out, step):
        end = min(num_out, start + step)
        result[:, start:end] = functional.linear(rows, expanded(start, end))
    return result


def _packing(device: torch.device, weight: Int4Weight) -> Product | None:
    """Return torch's packed product with a weight, or None if the weight's shape does not allow it."""
    num_rows, width = len(weight.codes), weight.codes.shape[1] * 2
    scales = weight.scales.to(device)
    aten = torch.ops.aten
    if device.type == "cpu":
        if num_rows % 16:
            return None
        codes = torch.stack((weight.codes >> 4, weight.codes & _HIGHEST), dim=-1).view(num_rows, width)
        packed = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)  # noqa: SLF001 - there is no public one
        return lambda rows: aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scales)  # noqa: SLF001
    tiles = next((tiles for tiles in (8, 4, 2) if width % (tiles * 16) == 0), None)
    if num_rows % 8 or tiles is None:
        return None
    packed = aten._convert_weight_to_int4pack(weight.codes.to(device), tiles)  # noqa: SLF001
    return lambda rows: aten._weight_int4pack_mm(rows, packed, GROUP, scales)  # noqa: SLF001


@cache
def packed_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether torch's packed product gives on this device what plain operations give."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((64, 4 * GROUP))
    weight = Int4Weight.of(shape, [torch.randn(shape, generator=generator)], dtype)
    try:
        with torch.inference_mode():
            for count in (1, 5):
                rows = torch.randn((count, shape[1]), generator=generator).to(device, dtype)
                packing = _packing(device, weight)
                if packing is None:
                    return False
                expected = _plain_product(weight.to(device))(rows).float()
                difference = float((packing(rows).float() - expected).abs().max())
                if not difference < 0.02 * float(expected.abs().max()):
                    _LOG.warning("packed 4-bit products differ by %.2g from plain ones, not used", difference)
                    return False
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        _LOG.info("packed 4-bit products are not available on %s: %s", device, error)
        return False
    return True


class Int8WeightLinear(nn.Linear):
    """A linear layer with 8-bit weights and activations of any float type; its `weight` has the codes."""

    scales: torch.Tensor

    def __init__(
        self, weight: Int8Weight, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        num_out, num_in = weight.values.shape
        super().__init__(num_in, num_out, bias=False, device="meta")
        self.weight = nn.Parameter(weight.values.to(device), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        # In float32 before they go to the device: some have no float64.
        self.register_buffer("scales", weight.scales.float().to(device, dtype), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the product, in the type of the input."""
        rows = input.reshape(-1, self.in_features)
        output = _by_blocks(rows, self.out_features, self.in_features, self._expanded)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)

    def _expanded(self, start: int, end: int) -> torch.Tensor:
        # Scaled before the product: in float16 sums of codes overflow.
        return self.weight[start:end].to(self.scales.dtype) * self.scales[start:end, None]
