"""Training: from examples to an adapter, in steps that can be interrupted and resumed exactly.

Everything in a step follows from its number: the examples, the learning rate, the seed of the dropout. A
checkpoint is the adapter's weights, the optimiser's moments and that number, in safetensors and JSON, never
pickled. Several processes (torchrun, gloo) each compute a part of a step's examples and sum their gradients;
the first one reports and writes. Runs in the training process, see `worker`.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed

from midfill.errors import AdapterError
from midfill.system.json_files import read_json
from midfill.system.private import private, private_folder
from midfill.training.data import Example
from midfill.training.model import Adapted, Recipe

_WEIGHTS, _MOMENTS, _STATE = "weights.safetensors", "moments.safetensors", "state.json"
_SAVE_EVERY_S = 120.0
_MAX_EPOCHS = 3
# Fewer steps change little but noise.
_MIN_STEPS = 4
_LEAST_RATE = 0.1


class InterruptedTrainingError(AdapterError):
    """The training was stopped by a signal, and a checkpoint written."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a training.

    Attributes:
        steps, planned: optimiser steps that were made, and that the schedule was made for.
        seconds: computing time.
        seconds_per_step: mean computing time of a step.
        losses: the mean loss of each step, in nats per token.
        tokens: tokens that were computed.
    """

    steps: int
    planned: int
    seconds: float
    seconds_per_step: float
    losses: tuple[float, ...]
    tokens: int


@dataclass(slots=True)
class _State:
    """The progress of a training. Only a training of the same `identity` can resume it."""

    identity: dict[str, Any]
    planned: int = 0
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] | None = None


class Trainer:
    """One training.

    Args:
        adapted: the model with its adapter at its start values.
        recipe: hyperparameters.
        examples: the training examples.
        folder: the folder of the checkpoint.
        identity: values that must be equal in a checkpoint: digest of the data, fingerprint of the base.
        stop: asked often; true ends the training with a checkpoint.
        tell: called with the share done and a message.
    """

    def __init__(
        self,
        adapted: Adapted,
        recipe: Recipe,
        examples: Sequence[Example],
        folder: Path,
        identity: dict[str, Any],
        stop: Callable[[], bool],
        tell: Callable[[float, str], None],
    ) -> None:
        self._adapted = adapted
        self._recipe = recipe
        self._examples = examples
        self._folder = folder
        self._stop = stop
        self._tell = tell
        self._rank = distributed.get_rank() if distributed.is_initialized() else 0
        self._world = distributed.get_world_size() if distributed.is_initialized() else 1
        self._parameters = list(adapted.parameters.values())
        self._optimiser = torch.optim.AdamW(self._parameters, lr=recipe.learning_rate, weight_decay=0.0)
        self._state = _State(identity | {"recipe": asdict(recipe)}, losses=[])

    def run(self, budget_s: float, *, max_steps: int | None = None, resume: bool = False) -> Trained:
        """Train until the schedule or the budget ends.

        The number of steps follows from the time of a measured step; `max_steps` fixes it instead. Raises
        `InterruptedTrainingError` when stopped, `AdapterError` if the checkpoint is of another training or
        the loss becomes NaN or infinite.
        """
        if resume:
            self._load()
        state = self._state
        most = max(_MIN_STEPS, len(self._examples) * _MAX_EPOCHS // self._recipe.batch)
        if not state.planned and max_steps is not None:
            state.planned = max_steps
        saved_s = begun_s = time.monotonic()
        before_s = state.seconds
        if not state.planned:
            state.planned = max(_MIN_STEPS, min(most, int(budget_s / self._longest(self._measure()))))
        while state.step < state.planned:
            state.losses = [*(state.losses or []), self._step(state.step)]
            state.step += 1
            now_s = time.monotonic()
            state.seconds = before_s + now_s - begun_s
            self._tell(
                state.step / state.planned,
                f"step {state.step} of {state.planned}, loss {state.losses[-1]:.3f}",
            )
            late = state.seconds > budget_s * 1.15 and max_steps is None
            if self._agreed(late) and state.step >= _MIN_STEPS:
                break
            if now_s - saved_s > _SAVE_EVERY_S:
                self.save()
                saved_s = now_s
        self.save()
        return Trained(
            state.step,
            state.planned,
            round(state.seconds, 1),
            round(state.seconds / max(1, state.step), 3),
            tuple(round(one, 5) for one in state.losses or ()),
            state.tokens,
        )

    def _step(self, step: int) -> float:
        loss = self._gradients(step)
        if not math.isfinite(loss):
            raise AdapterError(
                f"The loss became NaN or infinite at step {step + 1}. The last checkpoint is kept."
            )
        torch.nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip)
        for group in self._optimiser.param_groups:
            group["lr"] = self._recipe.learning_rate * rate_at(step, self._state.planned, self._recipe.warmup)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, step: int) -> float:
        """Accumulate the gradients of a step's examples; return the mean loss per token."""
        batch = self._batch(step)
        num_tokens = sum(len(example.target) for example in batch)
        self._adapted.train_mode()
        self._optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for number, example in enumerate(batch):
            if number % self._world != self._rank:
                continue
            if self._agreed_stop():
                self._optimiser.zero_grad(set_to_none=True)
                self.save()
                raise InterruptedTrainingError(
                    f"Training stopped at step {self._state.step}; a checkpoint is in {self._folder}."
                )
            torch.manual_seed(hash((self._recipe.seed, step, number)) & 0x7FFFFFFF)
            loss = self._adapted.losses(example).sum() / num_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            self._state.tokens += len(example.prompt) + len(example.target)
        return self._add_up(total)

    def _measure(self) -> float:
        """Return the estimated seconds of a step. Changes neither weights nor gradients."""
        batch = self._batch(0)
        self._adapted.train_mode()
        seconds = tokens = 0.0
        for number, example in enumerate((batch[0], batch[0], batch[-1])):
            begun_s = time.monotonic()
            self._adapted.losses(example).sum().backward()  # type: ignore[no-untyped-call]
            if number:  # The first pass is slower than the others.
                seconds += time.monotonic() - begun_s
                tokens += len(example.prompt) + len(example.target)
        self._optimiser.zero_grad(set_to_none=True)
        step_tokens = sum(len(example.prompt) + len(example.target) for example in batch) / self._world
        return max(1e-6, seconds / tokens * step_tokens)

    def _batch(self, step: int) -> list[Example]:
        """Return the examples of a step. Each epoch has all examples, shuffled differently."""
        size = min(self._recipe.batch, len(self._examples))
        per_epoch = len(self._examples) // size
        epoch, number = divmod(step, per_epoch)
        order = list(range(len(self._examples)))
        random.Random(f"{self._recipe.seed}:{epoch}").shuffle(order)
        return [self._examples[index] for index in order[number * size : (number + 1) * size]]

    def _add_up(self, total: float) -> float:
        """Sum gradients and loss over all processes."""
        if self._world == 1:
            return total
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat(
            [parameter.grad.flatten() for parameter in self._parameters if parameter.grad is not None]
        )
        flat = torch.cat([flat, torch.tensor([total], device=flat.device, dtype=flat.dtype)])
        distributed.all_reduce(flat)
        at = 0
        for parameter in self._parameters:
            parameter.grad = flat[at : at + parameter.numel()].view_as(parameter).clone()
            at += parameter.numel()
        return float(flat[-1])

    def _agreed_stop(self) -> bool:
        # Several processes get the signal at different points, so they stop together at the step's end.
        return self._world == 1 and self._stop()

    def _agreed(self, late: bool) -> bool:
        """Return whether to end here for lack of time; all processes decide together."""
        stopped = self._stop()
        if self._world > 1:
            flags = torch.tensor([float(late), float(stopped)])
            distributed.all_reduce(flags)
            late, stopped = bool(flags[0]), bool(flags[1])
        if stopped:
            self.save()
            raise InterruptedTrainingError(
                f"Training stopped at step {self._state.step}; a checkpoint is in {self._folder}."
            )
        return late

    def _longest(self, seconds: float) -> float:
        if self._world > 1:
            slowest = torch.tensor([seconds])
            distributed.all_reduce(slowest, op=distributed.ReduceOp.MAX)
            return float(slowest)
        return seconds

    def save(self) -> None:
        """Replace the checkpoint atomically."""
        if self._rank != 0:
            return
        new = self._folder.with_name(self._folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        private_folder(new)
        save_file(
            {name: one.detach().contiguous() for name, one in self._adapted.parameters.items()},
            new / _WEIGHTS,
        )
        moments = {}
        for name, parameter in self._adapted.parameters.items():
            for key, value in self._optimiser.state.get(parameter, {}).items():
                moments[f"{key}:{name}"] = value.detach().contiguous()
        save_file(moments, new / _MOMENTS)
        (new / _STATE).write_text(json.dumps(asdict(self._state)), encoding="utf-8")
        for file in new.iterdir():
            private(file)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        old = self._folder.with_name(self._folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if self._folder.exists():
            self._folder.rename(old)
        new.rename(self._folder)
        shutil.rmtree(old, ignore_errors=True)

    def _load(self) -> None:
        folder = self._folder if self._folder.exists() else self._folder.with_name(self._folder.name + ".old")
        try:
            content = read_json(folder / _STATE)
            found = _State(**content)
            wanted = json.loads(json.dumps(self._state.identity))
            if found.identity != wanted:
                differing = sorted(key for key in wanted if found.identity.get(key) != wanted[key])
                raise AdapterError(
                    f"The checkpoint in {folder} is of another training: {', '.join(differing)} differ. "
                    "Start again without --resume, or use another --name."
                )
            weights = load_file(folder / _WEIGHTS)
            moments = load_file(folder / _MOMENTS)
            with torch.no_grad():
                for name, parameter in self._adapted.parameters.items():
                    parameter.copy_(weights[name])
                    state = {
                        key.partition(":")[0]: value.to(
                            value.device if key.startswith("step:") else parameter.device
                        )
                        for key, value in moments.items()
                        if key.partition(":")[2] == name
                    }
                    if state:
                        self._optimiser.state[parameter] = state
        except FileNotFoundError as error:
            raise AdapterError(
                f"There is no checkpoint in {folder} to resume. Run without --resume."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise AdapterError(
                f"The checkpoint in {folder} cannot be read ({error!r}). Start again without --resume."
            ) from error
        self._state = found


def checkpoint_base_weights(folder: Path) -> str | None:
    """Return the form of the base model's weights in the training of a checkpoint; None if not known."""
    for place in (folder, folder.with_name(folder.name + ".old")):
        try:
            found = read_json(place / _STATE)["identity"]["base_weights"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return str(found)
    return None


def agree_on_base_weights(form: str) -> str:
    """Return the form of the base model's weights for all processes: int8 if one of them has chosen it."""
    if not distributed.is_initialized():
        return form
    small = torch.tensor(float(form == "int8"))
    distributed.all_reduce(small, op=distributed.ReduceOp.MAX)
    return "int8" if small else form


def rate_at(step: int, planned: int, warmup: float) -> float:
    """Return a step's learning rate as a share of the maximum: linear warm-up, cosine decay to a tenth."""
    rising = max(1, round(planned * warmup))
    if step < rising:
        return (step + 1) / rising
    share = (step - rising) / max(1, planned - rising)
    return _LEAST_RATE + (1 - _LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * share))
