"""How much memory learning takes, and in which form the base fits.

Runs no model, imports no torch. What is said is for a CPU. It is an estimate; server/LOG.md has what was
measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midfill.adapters.format import layers_of
from midfill.errors import AdapterError
from midfill.models.safetensors_io import find_tensors, shapes_of
from midfill.models.store import read_config
from midfill.settings import Settings
from midfill.training.data import MAX_TARGET_TOKENS

FORMS = ("float32", "int8")
"""In which form a base can be held, the quickest first."""

RANK = 16
"""Of the adapter that `midfill adapter train` makes."""

_MB = 1e6
_LIBRARIES = 450e6
# Of an engine's memory, for each of a model's weights: its own form, and what goes with it.
_ENGINE_BYTES = 2.4
_ENGINE_BYTES_OF = {"float32": 4.4}


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that a job takes, in bytes.

    Attributes:
        weights: of the base.
        adapter: its weights; to learn, their gradients and the optimiser's two moments too.
        activations: of one example, at most.
        holes: what is freed, and not given back to the system.
        engines: of the judgement's two, which come when all else has gone.
    """

    weights: float
    adapter: float
    activations: float
    holes: float
    engines: float

    def total(self, num_processes: int = 1) -> float:
        """The most at a time, with the libraries. Of several processes one judges."""
        learning = self.weights + self.adapter + self.activations + self.holes
        return num_processes * _LIBRARIES + max(num_processes * learning, self.engines)


def needed(model: Path, form: str, settings: Settings, *, learns: bool = True) -> Need:
    """What learning and judging take, or judging alone, by the longest example that the settings allow.

    Args:
        model: the base's folder.
        form: of its weights; see `FORMS`.
        settings: the user's.
        learns: whether there is a way back.

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
    # In int8, of each linear layer what it puts out, and what goes into a layer and into attention, is kept
    # (see `frozen`); else what goes into each too, once as it is and once with dropout.
    kept = outputs + 2 * depth * width + (2 * inputs if form == "float32" else 0)
    tokens = _longest(settings)
    # A layer is there as a whole. Logits are there with their logarithms and both gradients.
    logits = 4 * MAX_TARGET_TOKENS * (config.get("vocab_size") or 0)
    activations = 4 * (tokens * kept * (learns + 4 / depth) + logits)
    return Need(
        weights=4 * others + (1 if form == "int8" else 4) * matrices,
        adapter=4 * (4 if learns else 1) * RANK * (outputs + inputs),
        activations=activations,
        # Examples differ in length, so that what one leaves does not fit the next.
        holes=0 if form == "int8" and sys.platform == "linux" else activations / 2,
        engines=2 * _ENGINE_BYTES_OF.get(settings.dtype, _ENGINE_BYTES) * (matrices + others),
    )


def _longest(settings: Settings) -> int:
    """The most tokens that an example has with these settings."""
    context = settings.context_tokens if settings.context else 0
    return settings.prefix_tokens + settings.suffix_tokens + context + MAX_TARGET_TOKENS


def estimate(  # noqa: PLR0913 - each is a different thing
    model: Path, wanted: str, settings: Settings, free: float, num_processes: int = 1, *, learns: bool = True
) -> dict[str, Any]:
    """What each form takes, what is free, and which it is to be, for `midfill adapter plan`.

    Args:
        model: the base's folder.
        wanted: a form, which is taken at its word; or "auto", the first that fits, None if none does.
        settings: the user's.
        free: bytes that programs could have now without others being swapped out.
        num_processes: on this machine.
        learns: whether more is done than judging.
    """
    needs = {form: needed(model, form, settings, learns=learns).total(num_processes) for form in FORMS}
    fits = [form for form in FORMS if needs[form] <= free]
    return {
        "free_mb": round(free / _MB),
        "needed_mb": {form: round(need / _MB) for form, need in needs.items()},
        "fits": fits,
        "base_weights": (fits[0] if fits else None) if wanted == "auto" else wanted,
    }


def choose_form(estimate: Mapping[str, Any], num_processes: int = 1) -> str:
    """The form that a survey has come to. Raises `AdapterError` if there is too little memory for each."""
    if (form := estimate["base_weights"]) is not None:
        return str(form)
    smallest = min(FORMS, key=lambda form: estimate["needed_mb"][form])
    fewer = "fewer --processes, " if num_processes > 1 else ""
    need, free = estimate["needed_mb"][smallest] / 1000, estimate["free_mb"] / 1000
    raise AdapterError(
        f"It takes about {need:.1f} GB of memory with the base in {smallest}, and {free:.1f} GB are free. "
        f"Close other programs, take {fewer}a smaller --model or smaller prefix_tokens, or have it tried "
        f"all the same: --base-weights {smallest}."
    )
