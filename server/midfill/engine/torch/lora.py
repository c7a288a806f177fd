"""Loaded LoRA adapters in a torch model: low-rank terms beside its linear layers, in fixed buffers.

A layer that an adapter changes is wrapped; the base layer stays as it is, in whatever form. The matrices of
all adapters lie in one pair of buffers per layer, each adapter in a span of the ranks, so that an adapter is
loaded by a copy, captured CUDA graphs stay valid, and one pass serves several adapters. Without adapters
nothing is wrapped. Knows modules; nothing of caches or requests. Runs on the engine thread only, except for
`prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from midfill.adapters.format import Adapter
from midfill.engine.adapters.lora_stack import LoraStack
from midfill.engine.api import MAX_ADAPTERS
from midfill.errors import AdapterError

_RANK_STEP = 16
"""Ranks are rounded up to a multiple of this, so that adapters of usual ranks fit into each other's spans."""

Uniform = tuple[int, int]
"""All tokens of a pass use the adapter that begins and ends here along the ranks."""


class LoraLayers:
    """The adapters of one model.

    Args:
        model: a transformers model, loaded.
        dtype: of the low-rank matrices.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._device: torch.device = model.device
        self._wrapped: dict[str, _LoraLinear] = {}
        self._span_rank = 0
        self._stack = LoraStack.of({})
        self._table = torch.zeros(0)
        self.choice: Uniform | torch.Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._wrapped)

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], bool]:
        """Prepare to have exactly these adapters. Any thread.

        Returns a function that installs them, to be called between two passes; it returns whether modules or
        buffers were replaced, which makes captured graphs useless.

        Raises:
            AdapterError: an adapter changes a layer that cannot be wrapped.
        """
        ranks = [adapter.rank for adapter in adapters.values()]
        span_rank = max([-(-rank // _RANK_STEP) * _RANK_STEP for rank in ranks], default=0)
        rebuild = span_rank > self._span_rank or not adapters
        span_rank = max(span_rank, self._span_rank)
        stack = _allocate(adapters, self._stack.spans, span_rank)
        layers = self._linears(stack.layers)
        new = layers.keys() - self._wrapped.keys()
        if not rebuild and not new:
            matrices = {name: self._matrices(stack, name, self._wrapped[name].base) for name in self._wrapped}
        else:
            layers |= {name: wrapped.base for name, wrapped in self._wrapped.items() if adapters}
            matrices = {name: self._matrices(stack, name, base) for name, base in layers.items()}
        table = torch.zeros((MAX_ADAPTERS + 1, stack.rank), dtype=self._dtype)
        for begin, end in stack.spans.values():
            table[1 + begin // span_rank, begin:end] = 1
        table = table.to(self._device)

        def install() -> bool:
            if rebuild or new:
                self._remove()
                self._wrapped = {
                    name: self._wrap(name, base, *matrices[name]) for name, base in layers.items()
                }
                self._span_rank = span_rank if adapters else 0
                self._table = table
            else:
                with torch.inference_mode():
                    for name, (down, up) in matrices.items():
                        self._wrapped[name].down.copy_(down)
                        self._wrapped[name].up.copy_(up)
                    self._table.copy_(table)
            self._stack = stack
            return rebuild or bool(new)

        return install

    def index(self, key: str | None) -> int:
        """Return the row of an adapter in the table that `choose_rows` reads; 0 is the base."""
        return 0 if key is None else 1 + self._stack.spans[key][0] // self._span_rank

    def choose(self, tokens: Sequence[tuple[str | None, int]]) -> None:
        """Set the adapters of the next pass: keys in the order of the tokens, and a count for each."""
        keys = {key for key, _ in tokens} if self._wrapped else {None}
        if len(keys) == 1:
            [key] = keys
            self.choice = None if key is None else self._stack.spans[key]
            return
        rows = [self.index(key) for key, count in tokens for _ in range(count)]
        self.choice = self._table[torch.tensor(rows, device=self._device)]

    def choose_rows(self, indexes: torch.Tensor | None, width: int) -> None:
        """Set them for a pass that is captured: rows of equal width, whose indexes are on the device.

        Without indexes the pass is one of the base model only.
        """
        self.choice = None if indexes is None else self._table[indexes].repeat_interleave(width, dim=0)

    def _matrices(self, stack: LoraStack, name: str, base: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both matrices of a layer, the ranks first."""
        down = torch.from_numpy(stack.down([name], base.in_features))
        up = torch.from_numpy(np.ascontiguousarray(stack.up(name, base.out_features).T))
        return down.to(self._device, self._dtype), up.to(self._device, self._dtype)

    def _linears(self, names: frozenset[str]) -> dict[str, Any]:
        """Return the base layers of these names, unwrapped."""
        found = {}
        for name in names:
            try:
                module = self._model.get_submodule(name)
            except AttributeError:
                module = None
            base = module.base if isinstance(module, _LoraLinear) else module
            if not isinstance(base, nn.Linear) and not getattr(base, "acts_as_linear", False):
                raise AdapterError(
                    f"The adapter changes {name}, which is not a linear layer of the model "
                    f"({type(base).__name__}); such adapters are not supported."
                )
            found[name] = base
        return found

    def _wrap(self, name: str, base: Any, down: torch.Tensor, up: torch.Tensor) -> _LoraLinear:
        wrapped = _LoraLinear(base, self, down, up)
        self._set(name, wrapped)
        return wrapped

    def _remove(self) -> None:
        for name, wrapped in self._wrapped.items():
            self._set(name, wrapped.base)
        self._wrapped = {}

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)


class _LoraLinear(nn.Module):
    """A linear layer with the low-rank terms of all adapters.

    Attributes:
        base: the layer itself.
        down: rank x inputs.
        up: rank x outputs, scales included.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, base: Any, layers: LoraLayers, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self._layers = layers
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the base layer's output plus the terms of the adapters of each token."""
        output: torch.Tensor = self.base(inputs)
        choice = self._layers.choice
        if choice is None:
            return output
        rows = inputs.reshape(-1, inputs.shape[-1])
        if isinstance(choice, tuple):
            begin, end = choice
            low, up = rows @ self.down[begin:end].T, self.up[begin:end]
        else:
            low, up = (rows @ self.down.T) * choice, self.up
        return torch.addmm(output.reshape(-1, output.shape[-1]), low, up).view(output.shape)


def _allocate(adapters: Mapping[str, Adapter], before: Mapping[str, Any], rank: int) -> LoraStack:
    """Assign spans of equal size. An adapter that has one keeps it, so that little is written again."""
    free = [number for number in range(MAX_ADAPTERS) if rank]
    numbers: dict[str, int] = {}
    for key in adapters:
        if key in before and (number := before[key][0] // rank) in free and before[key][0] % rank == 0:
            numbers[key] = number
            free.remove(number)
    for key in adapters:
        if key not in numbers:
            numbers[key] = free.pop(0)
    spans = {key: (number * rank, number * rank + adapters[key].rank) for key, number in numbers.items()}
    return LoraStack(adapters, spans, max(1, MAX_ADAPTERS * rank))
