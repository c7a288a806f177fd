"""The job that a training process works on, and the folder that it works in.

Imported by the commands that start a process (`process`) and by the process itself (`worker`, `pipeline`).
Runs no model, imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from midfill.adapters.registry import is_name
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.system.folders import data_folder

RENDEZVOUS = "MIDFILL_RENDEZVOUS"
"""Environment variable: the file by which several processes of one training find each other."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Thresholds of the conditions that an adapter has to meet; see `verdict.decide`.

    Attributes:
        commits, examples: minimum number to decide by.
        general: maximum log-loss on other code, as a share of the base model's.
        latency: maximum time of an answer, as a share of the base model's.
        gain: minimum gain that is worth an adapter, in nats per token. Even noise has some effect, and with
            enough examples a tiny effect is significant.
    """

    commits: int = 20
    examples: int = 150
    general: float = 1.02
    latency: float = 1.10
    gain: float = 0.01


@dataclass(frozen=True, slots=True)
class Job:
    """A training or an evaluation.

    Attributes:
        repo: a folder in the repository.
        name: the adapter's name in the registry.
        budget_s: seconds for training and evaluation.
        resume: continue from the checkpoint.
        force: use the adapter whatever the verdict; this is recorded and shown.
        num_threads: CPU threads.
        max_steps: fixes the number of steps; None derives it from the budget.
        changes: changes of the recipe, for tests.
        limits: conditions of the verdict.
        seed: seed of the examples.
        base_weights: form of the base model's weights; "auto" is what fits into free memory, see `memory`.
    """

    repo: Path
    name: str
    budget_s: float
    resume: bool = False
    force: bool = False
    num_threads: int = 1
    max_steps: int | None = None
    changes: tuple[tuple[str, Any], ...] = ()
    limits: Limits = field(default_factory=Limits)
    seed: int = 0
    base_weights: str = "auto"


def run_folder(name: str) -> Path:
    """Return the folder of a training: checkpoints, the adapter, the report."""
    return data_folder() / "training" / name


def can_resume(name: str) -> bool:
    """Return whether a training of that name has left a checkpoint."""
    return any((run_folder(name) / folder).is_dir() for folder in ("checkpoint", "checkpoint.old"))


def name_for(folder: Path) -> str:
    """Return a valid adapter name made from the name of a folder: a repository's, or an adapter's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:64]
    # Snapshot folders of the hub are named by digests, which are no names for adapters.
    return name if is_name(name) else f"adapter-{name}".rstrip("-")[:64]


def most_threads() -> int:
    """Return the number of cores less one, which stays free for the editor and its servers."""
    from midfill.engine.torch.threads import num_cores

    return max(1, num_cores() - 1)


def request_of(
    kind: str,
    job: Job,
    model: LocalModel,
    settings: Settings,
    adapter: Path | None = None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """Return a job as JSON, as `worker` reads it.

    `kind` is "train" or "eval"; `adapter` and `fingerprint` (of its base model, if known) are for "eval".
    """
    return {
        "kind": kind,
        "job": {**asdict(job), "repo": str(job.repo)},
        "model": {**asdict(model), "path": str(model.path)},
        "settings": settings.model_dump(),
        "adapter": None if adapter is None else str(adapter),
        "fingerprint": fingerprint,
    }
