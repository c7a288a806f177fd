"""Choose a token from a row of logits in an array. Knows no library for models. Any thread."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from midfill.engine.scheduler import Choice

Floats = npt.NDArray[np.float32]


def chooser(rows: Sequence[Floats] | Floats, allowed: array[int] | None) -> Callable[[int], Choice]:
    """Return a function for `Chunk.verify`: the choice from each of these rows."""
    return lambda number: choose(rows[number], allowed)


def choose(logits: Floats, allowed: array[int] | None) -> Choice:
    """Return the most likely allowed id (None allows all) with its log-probability among all ids."""
    if allowed is None:
        token = int(logits.argmax())
    else:
        ids = np.frombuffer(allowed, np.int64)
        token = int(ids[logits[ids].argmax()])
    highest = logits.max()
    total = np.exp(logits - highest).sum(dtype=np.float64)
    return Choice(token, float(logits[token] - highest - np.log(total)))
