"""Use fewer kernels for the same arithmetic, in transformers' own modules.

A GPU spends less time on a token of a small model than on starting its kernels one after another. So
projections of the same input (query, key and value; gate and up) become one product, and a norm that is
written as seven operations becomes one. A module is replaced only if it has exactly the form that is known
here, and a norm only if its result agrees with the original.

Knows modules; nothing of caches or requests. Runs on the engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers that a module applies to the same input, by the names that most architectures use."""


@dataclass(frozen=True, slots=True)
class SharedProjection:
    """Linear layers that became one.

    Attributes:
        linear: name of the layer that computes all of them.
        parts: names of the layers that it replaces, in the order of its rows.
        sizes: number of outputs of each of them.
    """

    linear: str
    parts: tuple[str, ...]
    sizes: tuple[int, ...]


def fuse(model: Any) -> int:
    """Replace the modules that can be fused, in place. Return their number.

    Of a loaded model not more than one group of layers is in memory twice.
    """
    shared = fuse_projections(model)
    return sum(len(one.parts) for one in shared) + fuse_norms(model)


def fuse_projections(model: Any) -> list[SharedProjection]:
    """Replace linear layers that have the same input, in place.

    If their weights are on torch's meta device, so is the weight that replaces them: a loader can then read
    each of them into its rows, and none is ever in memory twice.
    """
    found = []
    for parent, names in _groups(model):
        module = model.get_submodule(parent)
        linears = [getattr(module, name) for name in names]
        shared = _Shared(linears)
        sizes = tuple(linear.out_features for linear in linears)
        # The layers are released here, before those of the next group are copied.
        del linears
        for index, name in enumerate(names):
            setattr(module, name, _Part(shared, index))
        parts = tuple(f"{parent}.{name}" if parent else name for name in names)
        found.append(SharedProjection(f"{parts[0]}._shared.linear", parts, sizes))
    return found


def _groups(model: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Return each group of layers that can be fused: the name of its parent, and their names in it."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for parent, module in model.named_modules():
        for names in _SIBLINGS:
            linears: list[Any] = [getattr(module, name, None) for name in names]
            # Not for subclasses: int8 and LoRA layers hold more than a weight.
            if all(type(linear) is nn.Linear for linear in linears) and _alike(linears):
                found.append((parent, names))
    return found


def fuse_norms(model: Any) -> int:
    """Replace each norm that has a known form by one operation, in place. Return their number."""
    replaced = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (norm := _fused_norm(child)) is not None:
                setattr(module, name, norm)
                replaced += 1
    return replaced


def _alike(linears: list[Any]) -> bool:
    return len({(linear.in_features, linear.bias is None, linear.weight.device) for linear in linears}) == 1


class _Shared(nn.Module):
    """Linear layers with the same input as one product, computed when the first output is requested.

    Attributes:
        linear: the layer that computes them; a loader may replace it by one with fewer bits.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [linear.out_features for linear in linears]
        self.in_features = linears[0].in_features
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        linear = nn.Linear(self.in_features, sum(self.sizes), bias=False, device="meta")
        with torch.no_grad():
            linear.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
            if biases:
                linear.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self.linear: nn.Module = linear
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self._num_unread = 0

    def part(self, inputs: torch.Tensor, index: int) -> torch.Tensor:
        """Return the output of one layer."""
        if self._input is not inputs:
            self._input = inputs
            product = self.linear(inputs)
            self._outputs = list(torch.split(product, self.sizes, dim=-1))
            self._num_unread = len(self.sizes)
        output = self._outputs[index]
        self._num_unread -= 1
        if not self._num_unread:
            # Keep no tensor alive; a later one at the same address would be taken for it.
            self._input, self._outputs = None, []
        return output


class _Part(nn.Module):
    """One of the layers that share a product. It can be wrapped with a LoRA layer, like `nn.Linear`."""

    acts_as_linear = True

    def __init__(self, shared: _Shared, index: int) -> None:
        super().__init__()
        self._shared = shared
        self._index = index
        self.in_features = shared.in_features
        self.out_features = shared.sizes[index]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the layer's output."""
        return self._shared.part(inputs, self._index)


class _FusedNorm(nn.Module):
    """The root-mean-square norm as one operation."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self._epsilon = epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalized input, computed by torch's own `rms_norm`."""
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self._epsilon)


def _fused_norm(module: nn.Module) -> nn.Module | None:
    """Return the same norm as one operation, or None if the module is not such a norm."""
    epsilon = getattr(module, "variance_epsilon", None)
    weight = getattr(module, "weight", None)
    if epsilon is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    fused = _FusedNorm(weight, epsilon)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn((1, 4, len(weight)), generator=generator).to(weight.device, weight.dtype)
    with torch.inference_mode():
        tolerance = 4 * torch.finfo(weight.dtype).eps
        same = torch.allclose(fused(example), module(example), rtol=tolerance, atol=tolerance)
    return fused if same else None
