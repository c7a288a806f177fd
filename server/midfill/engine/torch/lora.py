"""Resident adapters in a model of torch's: branches on its linear layers, in buffers with fixed addresses.

A layer that has a branch is wrapped; the base layer stays as it is, in whatever form. The matrices of all
adapters lie in one pair of buffers per layer, each in a place of its own, so that an adapter comes by a copy,
captured CUDA graphs stay valid, and one pass serves several adapters. Without adapters nothing is wrapped.
Knows modules; nothing of caches or requests. Runs on the engine thread only, but for `prepare`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from midfill.adapters.format import Adapter
from midfill.engine.adapters.lora_stack import Stack
from midfill.engine.api import MAX_ADAPTERS
from midfill.errors import AdapterError

_RANK_STEP = 16
"""Ranks are rounded up to a multiple, so that adapters of usual ranks fit into the places of each other."""

Uniform = tuple[int, int]
"""All tokens of a pass have the adapter that begins and ends here along the ranks."""


class Branches:
    """The adapters of one model.

    Args:
        model: a transformers model, loaded.
        dtype: of the branches.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self._dtype = dtype
        self._device: torch.device = model.device
        self._branched: dict[str, _Branched] = {}
        self._place_rank = 0
        self._stack = Stack.of({})
        self._table = torch.zeros(0)
        self.choice: Uniform | torch.Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._branched)

    def prepare(self, adapters: Mapping[str, Adapter]) -> Callable[[], bool]:
        """Get ready to have these adapters and no others. Any thread.

        Returns what puts them in, to be called between two passes; it tells whether modules or buffers are
        others now, so that what was captured is of no use any more.

        Raises:
            AdapterError: an adapter has a branch on a layer that cannot have one.
        """
        ranks = [adapter.rank for adapter in adapters.values()]
        place_rank = max([-(-rank // _RANK_STEP) * _RANK_STEP for rank in ranks], default=0)
        anew = place_rank > self._place_rank or not adapters
        place_rank = max(place_rank, self._place_rank)
        stack = _placed(adapters, self._stack.places, place_rank)
        layers = self._linears(stack.layers)
        new = layers.keys() - self._branched.keys()
        if not anew and not new:
            matrices = {
                name: self._matrices(stack, name, self._branched[name].base) for name in self._branched
            }
        else:
            layers |= {name: branched.base for name, branched in self._branched.items() if adapters}
            matrices = {name: self._matrices(stack, name, base) for name, base in layers.items()}
        table = torch.zeros((MAX_ADAPTERS + 1, stack.rank), dtype=self._dtype)
        for begin, end in stack.places.values():
            table[1 + begin // place_rank, begin:end] = 1
        table = table.to(self._device)

        def install() -> bool:
            if anew or new:
                self._remove()
                self._branched = {
                    name: self._wrap(name, base, *matrices[name]) for name, base in layers.items()
                }
                self._place_rank = place_rank if adapters else 0
                self._table = table
            else:
                with torch.inference_mode():
                    for name, (down, up) in matrices.items():
                        self._branched[name].down.copy_(down)
                        self._branched[name].up.copy_(up)
                    self._table.copy_(table)
            self._stack = stack
            return anew or bool(new)

        return install

    def index(self, key: str | None) -> int:
        """The row of an adapter in the table that `choose_rows` reads; 0 is the base."""
        return 0 if key is None else 1 + self._stack.places[key][0] // self._place_rank

    def choose(self, tokens: Sequence[tuple[str | None, int]]) -> None:
        """The next pass has these tokens, in this order: keys, and how many have them."""
        keys = {key for key, _ in tokens} if self._branched else {None}
        if len(keys) == 1:
            [key] = keys
            self.choice = None if key is None else self._stack.places[key]
            return
        rows = [self.index(key) for key, count in tokens for _ in range(count)]
        self.choice = self._table[torch.tensor(rows, device=self._device)]

    def choose_rows(self, indexes: torch.Tensor, width: int) -> None:
        """The same for a pass that is captured: rows of equal width, whose indexes are on the device."""
        self.choice = self._table[indexes].repeat_interleave(width, dim=0) if self._branched else None

    def _matrices(self, stack: Stack, name: str, base: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Both of a layer, the ranks first."""
        down = torch.from_numpy(stack.down([name], base.in_features))
        up = torch.from_numpy(np.ascontiguousarray(stack.up(name, base.out_features).T))
        return down.to(self._device, self._dtype), up.to(self._device, self._dtype)

    def _linears(self, names: frozenset[str]) -> dict[str, Any]:
        """The base layers of these names, unwrapped."""
        found = {}
        for name in names:
            try:
                module = self._model.get_submodule(name)
            except AttributeError:
                module = None
            base = module.base if isinstance(module, _Branched) else module
            if not isinstance(base, nn.Linear) and not getattr(base, "stands_for_linear", False):
                raise AdapterError(
                    f"The adapter has a branch on {name}, which is no linear layer of the model "
                    f"({type(base).__name__}); such an adapter is not served."
                )
            found[name] = base
        return found

    def _wrap(self, name: str, base: Any, down: torch.Tensor, up: torch.Tensor) -> _Branched:
        branched = _Branched(base, self, down, up)
        self._set(name, branched)
        return branched

    def _remove(self) -> None:
        for name, branched in self._branched.items():
            self._set(name, branched.base)
        self._branched = {}

    def _set(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self._model.get_submodule(parent), child, module)


class _Branched(nn.Module):
    """A linear layer with the branches of all adapters.

    Attributes:
        base: the layer itself.
        down: rank x inputs.
        up: rank x outputs, scales included.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, base: Any, branches: Branches, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self._branches = branches
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the layer gives, and what the adapters that its tokens have add to it."""
        output: torch.Tensor = self.base(inputs)
        choice = self._branches.choice
        if choice is None:
            return output
        rows = inputs.reshape(-1, inputs.shape[-1])
        if isinstance(choice, tuple):
            begin, end = choice
            low, up = rows @ self.down[begin:end].T, self.up[begin:end]
        else:
            low, up = (rows @ self.down.T) * choice, self.up
        return torch.addmm(output.reshape(-1, output.shape[-1]), low, up).view(output.shape)


def _placed(adapters: Mapping[str, Adapter], before: Mapping[str, Any], rank: int) -> Stack:
    """Adapters in places of equal size; who had one keeps it, so that little is written anew."""
    free = [number for number in range(MAX_ADAPTERS) if rank]
    places = {}
    for key in adapters:
        if key in before and (number := before[key][0] // rank) in free and before[key][0] % rank == 0:
            places[key] = number
            free.remove(number)
    for key in adapters:
        if key not in places:
            places[key] = free.pop(0)
    spans = {key: (number * rank, number * rank + adapters[key].rank) for key, number in places.items()}
    return Stack(adapters, spans, max(1, MAX_ADAPTERS * rank))
