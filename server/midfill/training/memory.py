"""Estimate the memory that training takes, and choose the form of the base model that fits.

Runs no model, imports no torch. docs/experiments has what was measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midfill.adapters.format import layers_of
from midfill.engine.torch.devices import CPU, Device, choose
from midfill.engine.torch.memory import RESERVE_BYTES
from midfill.errors import AdapterError
from midfill.models.safetensors_io import find_tensors, shapes_of
from midfill.models.store import read_config
from midfill.settings import Settings
from midfill.training.data import MAX_TARGET_TOKENS

FORMS = ("float32", "int8")
"""Forms in which the base model's weights can be held on a CPU, the fastest first."""

RANK = 16
"""Rank of the adapter that `midfill adapter train` makes."""

_MB = 1e6
_LIBRARIES = 450e6
# Bytes of an engine's memory per weight of the model: the weight itself, and what goes with it.
_ENGINE_BYTES = 2.4
_ENGINE_BYTES_OF = {"float32": 4.4}


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that a job takes, in bytes.

    Attributes:
        weights: the base model's weights.
        adapter: the adapter's weights; when training, also their gradients and the optimiser's two moments.
        activations: activations of the longest example.
        holes: memory that was freed but not returned to the system (fragmentation).
        engines: the two engines of the evaluation, which start when everything else has been released.
    """

    weights: float
    adapter: float
    activations: float
    holes: float
    engines: float

    @property
    def on_gpu(self) -> float:
        """The peak on a GPU, with a reserve for other programs. The engines start later, one by one."""
        return self.weights + self.adapter + self.activations + self.holes + RESERVE_BYTES

    def total(self, num_processes: int = 1) -> float:
        """Return the peak, libraries included. Of several processes only one evaluates."""
        learning = self.weights + self.adapter + self.activations + self.holes
        return num_processes * _LIBRARIES + max(num_processes * learning, self.engines)


def needed(model: Path, form: str, settings: Settings, *, learns: bool = True) -> Need:
    """Estimate training and evaluation, or evaluation alone, for the longest example that the settings allow.

    Args:
        model: the base model's folder.
        form: the form of its weights, one of `FORMS`, or "bfloat16" on a GPU.
        settings: the user's.
        learns: whether there is a backward pass.

    Raises:
        ModelError: the folder holds no model.
    """
    shapes = list(shapes_of(find_tensors(model)).values())
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    others = sum(math.prod(shape) for shape in shapes if len(shape) != 2)
    layers = layers_of(model)
    outputs = sum(out for out, _ in layers.values())
    inputs = sum(into for _, into in layers.values())
    config = read_config(model)
    width = config.get("hidden_size") or config.get("n_embd") or 0
    depth = config.get("num_hidden_layers") or config.get("n_layer") or 1
    # With int8, the outputs of each linear layer, and the inputs of a layer and of attention, are kept for
    # the backward pass (see `quantized_base`); otherwise the inputs of each linear layer too, with and
    # without dropout.
    kept = outputs + 2 * depth * width + (0 if form == "int8" else 2 * inputs)
    tokens = _longest(settings)
    # One layer is held as a whole. Logits are held with their logarithms and both gradients.
    logits = 4 * MAX_TARGET_TOKENS * (config.get("vocab_size") or 0)
    width_bytes = 2 if form == "bfloat16" else 4
    activations = width_bytes * tokens * kept * (learns + 4 / depth) + 4 * logits
    return Need(
        weights=width_bytes * others + (1 if form == "int8" else width_bytes) * matrices,
        adapter=4 * (4 if learns else 1) * RANK * (outputs + inputs),
        activations=activations,
        # Examples differ in length, so memory that one has freed does not fit the next.
        holes=0 if form == "int8" and sys.platform == "linux" else activations / 2,
        engines=2 * _ENGINE_BYTES_OF.get(settings.dtype, _ENGINE_BYTES) * (matrices + others),
    )


def _longest(settings: Settings) -> int:
    """Return the maximum number of tokens of an example with these settings."""
    context = settings.context_tokens if settings.context else 0
    return settings.prefix_tokens + settings.suffix_tokens + context + MAX_TARGET_TOKENS


def estimate(
    model: Path, wanted: str, settings: Settings, free: float, num_processes: int = 1, *, learns: bool = True
) -> dict[str, Any]:
    """Return what each form needs, what is free, and which form to use, as `midfill adapter plan` shows it.

    Args:
        model: the base model's folder.
        wanted: a form, which is used whether it fits or not; or "auto": the first that fits, else None.
        settings: the user's.
        free: bytes that are available without swapping other programs out.
        num_processes: training processes on this machine.
        learns: whether there is training, not evaluation alone.
    """
    needs = {form: needed(model, form, settings, learns=learns).total(num_processes) for form in FORMS}
    fits = [form for form in FORMS if needs[form] <= free]
    return {
        "free_mb": round(free / _MB),
        "needed_mb": {form: round(need / _MB) for form, need in needs.items()},
        "fits": fits,
        "base_weights": (fits[0] if fits else None) if wanted == "auto" else wanted,
    }


def estimate_on_gpu(
    model: Path, wanted: str, settings: Settings, device: Device, *, learns: bool = True
) -> dict[str, Any]:
    """Return the same as `estimate` for a GPU, which has one form: bfloat16 where it computes with it.

    Raises:
        AdapterError: another form is wanted.
    """
    form = "bfloat16" if device.half == "bfloat16" else "float32"
    if wanted not in ("auto", form):
        raise AdapterError(
            f"On the {device.name} the base model is held in {form}, not in {wanted}. Run without "
            "--base-weights, or set device to cpu."
        )
    need, free = needed(model, form, settings, learns=learns).on_gpu, device.free_bytes()
    fits = [form] if need <= free else []
    return {
        "device": device.name,
        "free_mb": round(free / _MB),
        "needed_mb": {form: round(need / _MB)},
        "fits": fits,
        "base_weights": fits[0] if fits else None,
    }


def place(
    model: Path,
    wanted: str,
    settings: Settings,
    gpus: Sequence[Device],
    *,
    rank: int = 0,
    learns: bool = True,
) -> tuple[Device, dict[str, Any] | None]:
    """Return the device to train on, and its estimate if that is a GPU.

    With "auto" the CPU takes what does not fit into the GPU, where perhaps an editor's model is.

    Args:
        model: the base model's folder.
        wanted: a form, or "auto".
        settings: the user's.
        gpus: the GPUs to choose from.
        rank: number of this process on this machine: each has its own GPU.
        learns: see `needed`.

    Raises:
        EngineError: the device of the settings cannot be had.
        AdapterError: there is not enough memory on it.
    """
    device, _ = choose(settings.device, gpus)
    if device.torch_name.startswith("cuda:"):
        first = int(device.torch_name.partition(":")[2])
        device, _ = choose(f"cuda:{first + rank}", gpus)
    if device.kind == "cpu":
        return device, None
    if settings.device == "auto" and wanted in FORMS:
        return CPU, None  # These are forms for a CPU.
    room = estimate_on_gpu(model, wanted, settings, device, learns=learns)
    if room["base_weights"] is None:
        if settings.device == "auto":
            return CPU, None
        choose_form(room)
    return device, room


@contextmanager
def out_of_memory(device: Device) -> Iterator[None]:
    """Raise `AdapterError` with the remedies for whatever is raised when a device is out of memory."""
    from midfill.engine.torch.errors import memory_errors

    try:
        with memory_errors():
            yield
    except MemoryError as error:
        where = "the computer" if device.kind == "cpu" else f"the {device.name}"
        other = "" if device.kind == "cpu" else ", or set device to cpu"
        raise AdapterError(
            f"Training stopped: {where} has no memory left. Close other programs, use a smaller --model or a "
            f"smaller prefix_tokens{other}. If there is a checkpoint, --resume continues from it."
        ) from error


def choose_form(estimate: Mapping[str, Any], num_processes: int = 1) -> str:
    """Return the form of an `estimate`. Raises `AdapterError` if there is not enough memory for any."""
    if (form := estimate["base_weights"]) is not None:
        return str(form)
    smallest = min(estimate["needed_mb"], key=lambda form: float(estimate["needed_mb"][form]))
    fewer = "fewer --processes, " if num_processes > 1 else ""
    need, free = estimate["needed_mb"][smallest] / 1000, estimate["free_mb"] / 1000
    if "device" in estimate:
        raise AdapterError(
            f"This needs about {need:.1f} GB of the {estimate['device']}'s memory with the base model in "
            f"{smallest}, and {free:.1f} GB are free. Close the editor and other programs that use it, use a "
            "smaller --model or a smaller prefix_tokens, or set device to cpu."
        )
    raise AdapterError(
        f"This needs about {need:.1f} GB of memory with the base model in {smallest}, and {free:.1f} GB are "
        f"free. Close other programs, use {fewer}a smaller --model or a smaller prefix_tokens, or try anyway "
        f"with --base-weights {smallest}."
    )
