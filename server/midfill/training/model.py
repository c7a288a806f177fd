"""A base model with a LoRA adapter in torch: losses, gradients, scales, PEFT's format.

The modules are transformers' own in float32, or with frozen int8 weights (`quantized_base`), on a GPU in
bfloat16; weights are loaded as the engine loads them. One sequence is computed at a time, without padding or
packing, and the head only at the target's positions: a quarter less work on a small model with a large
vocabulary. One thread owns it.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional

from midfill.adapters import format as peft_format
from midfill.engine.torch.weights import build_model
from midfill.errors import AdapterError
from midfill.models.safetensors_io import find_tensors
from midfill.models.store import LocalModel
from midfill.system import malloc
from midfill.system.last_request import make_marker, seconds_since
from midfill.system.private import private
from midfill.training.data import Example
from midfill.training.quantized_base import (
    FrozenInt8Linear,
    checkpoint_activations,
    layers_of,
    share_embedding,
)

_ADAPTER = "default"
_LIVE_S = 1.5
"""Seconds after a server's latest request during which a pass pauses between two layers."""

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyperparameters of a training.

    Attributes:
        rank, alpha, dropout: of the LoRA, on all linear layers except the head.
        learning_rate: the maximum, after a linear warm-up and before a cosine decay to a tenth.
        warmup: the warm-up's share of all steps.
        clip: maximum norm of the gradient.
        batch: examples per step.
        seed: seed of order, initial values and dropout.
    """

    learning_rate: float
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    batch: int = 8
    seed: int = 0


def recipe_for(num_parameters: int, **changes: Any) -> Recipe:
    """Return the default recipe for a base model's size; larger models get smaller learning rates."""
    rates = ((3e8, 1e-3), (1e9, 5e-4), (3e9, 3e-4))
    rate = next((rate for limit, rate in rates if num_parameters < limit), 2e-4)
    return Recipe(**{"learning_rate": rate, **changes})


class Adapted:
    """A base model with one adapter.

    Args:
        model: the base model.
        recipe: the adapter's form and initial values.
        num_threads: CPU threads.
        base_weights: "float32", "int8" (on a CPU only, see `quantized_base`) or "bfloat16".
        device: where the model goes.
        yields: whether to pause while a server on this machine answers a user.

    Attributes:
        parameters: the adapter's, by name, in a fixed order.
    """

    def __init__(
        self,
        model: LocalModel,
        recipe: Recipe,
        *,
        num_threads: int,
        base_weights: str = "float32",
        device: str = "cpu",
        yields: bool = True,
    ) -> None:
        self.local = model
        self.device = torch.device(device)
        torch.set_num_threads(num_threads)
        base = build_model(
            model.path,
            find_tensors(model.path),
            base_weights,
            self.device,
            num_threads=num_threads,
            ahead={},
            report=lambda _: None,
            int8_linear=FrozenInt8Linear,
        )
        # PEFT writes the name into the adapter's configuration; a path means nothing on other machines.
        base.name_or_path = model.name
        share_embedding(base)
        _switch_off_dropout(base)
        if base_weights == "int8":
            checkpoint_activations(base)
        self.layers = peft_format.layers_of(model.path)
        self._config = LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            lora_dropout=recipe.dropout,
            target_modules=sorted({name.rpartition(".")[2] for name in self.layers}),
            base_model_name_or_path=model.name,
        )
        torch.manual_seed(recipe.seed)
        with _quiet():
            # LoRA weights are float32, whatever the base is: optimiser steps are too small for bfloat16.
            self.peft: Any = get_peft_model(base, self._config)
        self.parameters: dict[str, nn.Parameter] = {
            name: one for name, one in self.peft.named_parameters() if one.requires_grad
        }
        self._branches = [one for one in self.peft.modules() if isinstance(one, LoraLayer)]
        self._full = [one.scaling[_ADAPTER] for one in self._branches]
        self._scale = 1.0
        if yields:
            make_marker()
            _stand_aside(base)

    def losses(self, example: Example) -> torch.Tensor:
        """Return the negative log-likelihood of each target token, in nats; float32."""
        ids = torch.tensor([(*example.prompt, *example.target[:-1])], device=self.device)
        target = torch.tensor(example.target, device=self.device)
        logits = self.peft(input_ids=ids, use_cache=False, logits_to_keep=len(target)).logits[0]
        return functional.cross_entropy(logits.float(), target, reduction="none")

    def loss_sum(self, example: Example) -> float:
        """Return the sum of `losses` at the present scale, without gradients and dropout."""
        return sum(self.middle_and_end(example))

    def middle_and_end(self, example: Example) -> tuple[float, float]:
        """Return the two parts of `loss_sum`: of the middle's tokens, and of the end-of-text."""
        self.peft.eval()
        with torch.inference_mode():
            losses = self.losses(example).double()
            return float(losses[:-1].sum()), float(losses[-1])

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Switch the adapter off within the context."""
        with self.peft.disable_adapter():
            yield

    @property
    def scale(self) -> float:
        """The adapter's strength: 0 is the base model, 1 the adapter as trained."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value
        for branch, full in zip(self._branches, self._full, strict=True):
            branch.scaling[_ADAPTER] = full * value

    def train_mode(self) -> None:
        """Switch dropout on, in the adapter only."""
        self.peft.train()

    def load(self, folder: Path) -> None:
        """Load the weights of an adapter's folder, checked against the base model's layers.

        Raises `AdapterError` if it is no adapter, does not fit, or has a larger rank than the recipe.
        """
        found = peft_format.read(folder, self.layers)
        with torch.no_grad():
            for branch in self._branches:
                branch.lora_B[_ADAPTER].weight.zero_()
            modules = {
                name.removeprefix("base_model.model."): one
                for name, one in self.peft.named_modules()
                if isinstance(one, LoraLayer)
            }
            for name, values in found.branches.items():
                branch = modules[name]
                down, up = branch.lora_A[_ADAPTER].weight, branch.lora_B[_ADAPTER].weight
                if values.down.shape[0] > down.shape[0]:
                    raise AdapterError(
                        f"The adapter {folder} has rank {values.down.shape[0]}; the maximum here is "
                        f"{down.shape[0]}."
                    )
                down.zero_()
                rank = values.down.shape[0]
                down[:rank] = torch.from_numpy(values.down)
                # Layers may have different scales; express each in terms of ours.
                share = values.scale / self._full[self._branches.index(branch)]
                up[:, :rank] = torch.from_numpy(values.up) * share
        self.scale = 1.0

    def save(self, folder: Path) -> None:
        """Write the adapter's folder, with the present scale in its configuration and dropout off."""
        config = self.peft.peft_config[_ADAPTER]
        before = config.lora_alpha, config.lora_dropout
        config.lora_alpha, config.lora_dropout = self._config_alpha() * self._scale, 0.0
        config.base_model_name_or_path = self.local.name
        try:
            with _quiet():
                self.peft.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
            for written in (folder, *folder.iterdir()):
                private(written)
        finally:
            config.lora_alpha, config.lora_dropout = before

    def probe_logits(self, example: Example) -> torch.Tensor:
        """Return the logits after a prompt, which differ between adapters and from the base."""
        self.peft.eval()
        ids = torch.tensor([example.prompt], device=self.device)
        with torch.inference_mode():
            logits: torch.Tensor = self.peft(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return logits[0, -1].float()

    def release(self) -> None:
        """Release the memory. Nothing can be computed afterwards."""
        self.peft = None
        self.parameters.clear()
        self._branches.clear()
        # Modules refer to each other in cycles, which only a garbage collection frees.
        gc.collect()
        malloc.trim()

    def _config_alpha(self) -> float:
        # The initial value; `save` changes it while writing only.
        return float(self._config.lora_alpha)


def _switch_off_dropout(model: Any) -> None:
    """Switch off the base model's own dropout, in modules and in the numbers of attention modules."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _stand_aside(model: Any) -> None:
    """Make forward and backward passes pause between layers while a user waits for a server's model."""

    def back(_gradient: torch.Tensor) -> None:
        wait_for_quiet()

    def forth(_module: nn.Module, _inputs: Any, output: Any) -> None:
        wait_for_quiet()
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(back)

    for layer in layers_of(model):
        layer.register_forward_hook(forth)


def wait_for_quiet() -> None:
    """Block until no server has had a request for `_LIVE_S` seconds."""
    while seconds_since() < _LIVE_S:
        time.sleep(_POLL_S)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # It looks a model up on the hub to see whether its vocabulary has grown; ours never does.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield
