"""Stacked LoRA weights: the matrices of all loaded adapters as one pair, and which part each token uses.

With the weights of several adapters stacked along their ranks, one product serves them all, and a mask tells
per token which part counts: y = W x + up @ (mask * (down @ x)). Tokens of the base model get zeros. An
adapter without weights for a layer has zeros there. Knows arrays; nothing of runners. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from midfill.adapters.format import Adapter

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LoraStack:
    """Adapters stacked one after the other.

    Attributes:
        adapters: by the keys that requests use.
        spans: begin and end of each along the ranks.
        rank: sum of the ranks of all spans, at least 1.
    """

    adapters: Mapping[str, Adapter]
    spans: Mapping[str, tuple[int, int]]
    rank: int

    @staticmethod
    def of(adapters: Mapping[str, Adapter]) -> LoraStack:
        """Stack the adapters as close together as their ranks allow."""
        spans = {}
        end = 0
        for key, adapter in adapters.items():
            spans[key] = (end, end + adapter.rank)
            end += adapter.rank
        return LoraStack(adapters, spans, max(1, end))

    @property
    def layers(self) -> frozenset[str]:
        """The layers that any of them changes."""
        return frozenset(name for adapter in self.adapters.values() for name in adapter.branches)

    def down(self, names: Sequence[str], num_inputs: int) -> Floats:
        """Return the down matrices of layers with the same input: (layers * rank) x inputs."""
        stacked = np.zeros((len(names) * self.rank, num_inputs), np.float32)
        for number, name in enumerate(names):
            for key, adapter in self.adapters.items():
                if (branch := adapter.branches.get(name)) is not None:
                    begin = number * self.rank + self.spans[key][0]
                    stacked[begin : begin + len(branch.down)] = branch.down
        return stacked

    def up(self, name: str, num_outputs: int) -> Floats:
        """Return the up matrix of a layer, with the scales multiplied in: outputs x rank."""
        stacked = np.zeros((num_outputs, self.rank), np.float32)
        for key, adapter in self.adapters.items():
            if (branch := adapter.branches.get(name)) is not None:
                begin = self.spans[key][0]
                stacked[:, begin : begin + branch.up.shape[1]] = np.float32(branch.scale) * branch.up
        return stacked

    def mask(self, tokens: Iterable[tuple[str | None, int]]) -> Floats:
        """Return which part each token uses: tokens x rank. `tokens`: keys (None for the base), counts."""
        rows = list(tokens)
        mask = np.zeros((sum(count for _, count in rows), self.rank), np.float32)
        at = 0
        for key, count in rows:
            if key is not None:
                begin, end = self.spans[key]
                mask[at : at + count, begin:end] = 1
            at += count
        return mask
