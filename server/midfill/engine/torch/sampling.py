"""Choose the next token from a row of logits. Greedy only. Runs on the engine thread only."""

from __future__ import annotations

from array import array

import torch

from midfill.engine.scheduler import Choice


def choose(logits: torch.Tensor, allowed: array[int] | None) -> Choice:
    """Return the most likely allowed id (None allows all) with its log-probability among all ids."""
    if allowed is None:
        token = logits.argmax()
    else:
        ids = torch.frombuffer(allowed, dtype=torch.int64).to(logits.device)
        token = ids[logits[ids].argmax()]
    logprob = logits[token] - logits.logsumexp(dim=0)
    return Choice(int(token), float(logprob))
