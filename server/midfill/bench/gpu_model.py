"""Models of known shapes whose random weights are made on a GPU: no disk, no tokenizer, no network.

For `midfill bench gpu`: the runner and the engine are the ones that serve, on such a model.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midfill.adapters.format import Adapter, Branch
from midfill.bench.shapes import SHAPES
from midfill.engine.adapters.loaded import LoadedAdapters
from midfill.engine.api import EngineSpec, ModelInfo, TextStream
from midfill.engine.kv_slots import NUM_SLOTS
from midfill.engine.loading import LoadedModel
from midfill.engine.scheduler import Choice, Chunk, SequenceState
from midfill.engine.token_healing import TokenIndex
from midfill.engine.torch import cuda
from midfill.engine.torch.runner import TorchRunner

_STANDARD_DEVIATION = 0.02


def build(config: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return a transformers model with random weights in the memory of a device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from midfill.engine.torch.weights import parameters_on_meta

    options = dict(config)
    kind = options.pop("model_type")
    with parameters_on_meta():
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **options), dtype=dtype, attn_implementation="sdpa"
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                weight.normal_(0, _STANDARD_DEVIATION)
            else:
                weight.fill_(0.0 if name == "bias" else 1.0)
            setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    model.to(device)  # the buffers, which the modules have computed
    return model.eval()


def shape_config(name: str, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the configuration of a known shape, with changes by kind of model, such as fewer layers."""
    config = SHAPES[name]
    return {**config, **changes.get(config["model_type"], {})}


def num_bytes(model: Any) -> int:
    """Return the size of a model's weights; tied ones count once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def serving(model: Any, dtype: str, device: torch.device) -> TorchRunner:
    """Return the runner that serves a model on a GPU. The model's layers are fused, in place."""
    from midfill.engine.torch.fuse import fuse

    fuse(model)
    runner = TorchRunner(model, dtype, device)
    runner.use_graphs(
        cuda.CudaDevice(device), partial(cuda.kernel, device), NUM_SLOTS, cuda.free_bytes(device)
    )
    return runner


def release(device: torch.device) -> None:
    """Free what belonged to models that are gone."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


@dataclass(slots=True)
class SlotDriver:
    """One sequence in a slot of a runner, advanced pass by pass.

    Attributes:
        runner: the runner.
        tokens: the sequence so far.
        slot: its slot.
        key: key of its adapter, or None.
        num_computed: how many tokens are in the slot.
    """

    runner: TorchRunner
    tokens: list[int]
    slot: int = 0
    key: str | None = None
    num_computed: int = 0

    def chunk(self) -> Chunk:
        """Return the next pass's part of the sequence."""
        end = min(len(self.tokens), self.num_computed + self.runner.chunk_tokens)
        part = self.tokens[self.num_computed : end]
        state = SequenceState(self.key, self.tokens)
        return Chunk(state, self.slot, self.num_computed, part, samples=end == len(self.tokens))

    def take(self, chunk: Chunk, chosen: Sequence[Choice]) -> None:
        """Note the result of a pass."""
        self.num_computed += len(chunk.tokens)
        if chosen:
            self.tokens.append(chosen[0].id)

    def step(self) -> None:
        """Run one pass."""
        chunk = self.chunk()
        [chosen] = self.runner.forward([chunk], [None])
        self.take(chunk, chosen)

    def prefill(self) -> None:
        """Run passes up to and including the first token that is chosen."""
        length = len(self.tokens)
        while len(self.tokens) == length:
            self.step()


def made_up_adapter(runner_model: Any, rank: int, key: str) -> Adapter:
    """Return an adapter with small values on all linear layers of a model, except for its head."""
    branches = {}
    for name, module in runner_model.named_modules():
        linear = type(module) is torch.nn.Linear or getattr(module, "acts_as_linear", False)
        # The product that fused layers share is not a layer of its own.
        if linear and "lm_head" not in name and "_shared" not in name.split("."):
            down = np.full((rank, module.in_features), 1e-3, np.float32)
            up = np.full((module.out_features, rank), 1e-3, np.float32)
            branches[name] = Branch(down, up, 1.0)
    return Adapter(Path(key), key, None, rank, branches)


class _Numbers:
    """The tokenizer of a model without one: each id is a letter."""

    control_ids: frozenset[int] = frozenset()

    def __init__(self, num_ids: int) -> None:
        self._num_ids = num_ids

    def encode(self, text: str) -> list[int]:
        return [0 for _ in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "x" * len(ids)

    def token_id(self, name: str) -> int | None:
        del name
        return None

    def vocab_bytes(self) -> list[bytes]:
        return [b"x"] * self._num_ids

    def stream(self) -> TextStream:
        return _Letters()


class _Letters:
    def push(self, token: int) -> str:
        del token
        return "x"


@dataclass(frozen=True, slots=True)
class _NoFolder:
    name: str
    path: Path = field(default_factory=Path)
    family: str | None = None


def engine_spec(name: str, device: torch.device) -> EngineSpec:
    """Return the spec of an engine for `loaded`."""
    return EngineSpec(_NoFolder(name), device=str(device), drafts=False)


def loaded(runner: TorchRunner, name: str) -> LoadedModel:
    """Return a runner as a loaded model, for `LocalEngine`."""
    info = ModelInfo(
        name,
        None,
        runner.architecture,
        runner.context,
        _Numbers(runner.vocab_size),
        runner.device,
        runner.dtype,
        attention=runner.attention,
    )
    adapters = LoadedAdapters(runner, lambda: None, None)
    return LoadedModel(info, runner, TokenIndex([b"x"], frozenset()), adapters)


def quiet(_message: str, _share: float | None) -> None:
    """Report no progress."""
