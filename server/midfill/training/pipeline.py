"""From a repository to an adapter and its verdict: examples > train > evaluate > register.

A run has a folder below the user's data: checkpoints, the adapter, the report. Only the report holds source
text, and only its owner can read it. Each use of test commits is recorded, so that trying until something
passes is counted (multiple comparisons).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from midfill.adapters import format as peft_format
from midfill.adapters.registry import Registry, locked
from midfill.engine.torch.devices import Device, find_gpus
from midfill.errors import AdapterError, MidfillError
from midfill.evaluation.records import Records
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.system import malloc, text_files
from midfill.system.folders import data_folder
from midfill.system.json_files import read_json
from midfill.system.measure import peak_rss_mb
from midfill.system.private import private_folder
from midfill.training import data, memory, report, verdict
from midfill.training.data import Example, Examples
from midfill.training.history import Repository
from midfill.training.job import Job, run_folder
from midfill.training.model import Adapted, Recipe, recipe_for
from midfill.training.selection import Selection, select
from midfill.training.trainer import Trained, Trainer, agree_on_base_weights, checkpoint_base_weights
from midfill.training.verdict import Measurements

FindGpus = Callable[[str], Sequence[Device]]

Tell = Callable[[str, float | None, str], None]
"""Called with the stage, the share of it that is done, and a message."""


@dataclass(slots=True)
class _Run:
    """Inputs of all stages."""

    job: Job
    model: LocalModel
    settings: Settings
    base_weights: str
    device: Device
    tell: Tell
    selection: Selection
    examples: Examples

    @property
    def folder(self) -> Path:
        return run_folder(self.job.name)


def _prepare(
    job: Job, model: LocalModel, settings: Settings, tell: Tell, num_train: int, find_gpus: FindGpus
) -> _Run:
    """Read the history and build the examples.

    Raises `MidfillError` if there is nothing to train on, or not enough memory.
    """
    device, base_weights = _place(job, model, settings, find_gpus, learns=bool(num_train))
    if base_weights == "int8":
        # Takes a tenth longer, and is used only where memory is short.
        malloc.give_large_blocks_back_at_once()
    tell("data", None, "reading the history")
    repository = Repository(job.repo)
    selection = select(repository, settings)
    tell("data", None, "building examples")
    examples = data.build_examples(repository, selection, model, settings, seed=job.seed, num_train=num_train)
    if (num_train and not examples.train) or not examples.test:
        raise MidfillError(
            f"The history of {repository.root} gives no examples to train on. To see what was skipped and "
            "why, run: midfill adapter plan"
        )
    return _Run(job, model, settings, base_weights, device, tell, selection, examples)


def _place(
    job: Job, model: LocalModel, settings: Settings, find_gpus: FindGpus, *, learns: bool
) -> tuple[Device, str]:
    """Return the device that the model goes to, and the form of its weights there."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = find_gpus(settings.device)
    device, room = memory.place(model.path, job.base_weights, settings, gpus, rank=rank, learns=learns)
    if room is None:
        return device, _base_weights(job, model, settings, learns=learns)
    return device, agree_on_base_weights(memory.choose_form(room))


def _base_weights(job: Job, model: LocalModel, settings: Settings, *, learns: bool = True) -> str:
    """Return the form of the weights on a CPU; a resumed training keeps the form of its checkpoint."""
    wanted = job.base_weights
    if wanted == "auto" and job.resume:
        kept = checkpoint_base_weights(run_folder(job.name) / "checkpoint")
        # A checkpoint of a GPU cannot be resumed on a CPU; it is refused later.
        wanted = kept if kept in memory.FORMS else wanted
    count = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    free = psutil.virtual_memory().available
    room = memory.estimate(model.path, wanted, settings, free, count, learns=learns)
    return agree_on_base_weights(memory.choose_form(room, count))


def train(
    job: Job,
    model: LocalModel,
    settings: Settings,
    tell: Tell,
    stop: Callable[[], bool],
    *,
    leads: bool = True,
    find_gpus: FindGpus = find_gpus,
) -> dict[str, Any]:
    """Train an adapter, evaluate it and register it with its verdict.

    Args:
        job: what to do.
        model: the base model.
        settings: the user's.
        tell: told the progress.
        stop: asked often; true ends the training with a checkpoint.
        leads: whether this is the process, of several that train, that evaluates and writes.
        find_gpus: returns the GPUs that the setting `device` chooses from.

    Returns:
        The result as `--json` prints it; {} if this process does not lead.

    Raises:
        MidfillError: there is nothing to train on, or the training was stopped.
    """
    begun_s = time.monotonic()
    if (taken := Registry().find(job.name)) is not None and not job.resume:
        raise AdapterError(
            f"An adapter named {taken.name!r} exists already. Use another --name, or remove it: "
            f"midfill adapter rm {taken.name}"
        )
    run = _prepare(job, model, settings, tell, data.NUM_TRAIN, find_gpus)
    with memory.out_of_memory(run.device):
        return _train_and_register(run, begun_s, stop, leads=leads)


def _train_and_register(
    run: _Run, begun_s: float, stop: Callable[[], bool], *, leads: bool
) -> dict[str, Any]:
    job, model, tell = run.job, run.model, run.tell
    tell("model", None, f"loading {model.name}")
    recipe = recipe_for(_num_parameters(model), **dict(job.changes))
    adapted = _adapted(run, recipe)
    problem = verdict.zero_scale_problem(adapted, run.examples.dev or run.examples.test)
    tell("train", 0.0, "log-loss of the base model on the dev commits")
    base_dev, forward_s = _base_on_dev(adapted, run, leads)
    budget_s = _training_budget(job.budget_s, time.monotonic() - begun_s, forward_s, run.examples)
    trained = _train(run, adapted, recipe, budget_s, stop)
    if not leads:
        return {}
    adapter = run.folder / "adapter"
    measurements = _choose_and_save(run, adapted, base_dev, adapter, problem)
    result = _evaluate(run, adapted, adapter, measurements, trained, time.monotonic() - begun_s)
    entry = Registry().add(
        adapter,
        name=job.name,
        base=model,
        evaluation=verdict.evaluation_of(result, forced=job.force),
        source=f"midfill adapter train on {run.selection.repository} at {run.selection.head[:12]}",
    )
    return {"adapter": entry.name, "digest": entry.digest, "forced": job.force, **result}


def evaluate(
    job: Job, adapter: Path, fingerprint: str | None, model: LocalModel, settings: Settings, tell: Tell
) -> dict[str, Any]:
    """Evaluate an existing adapter, as it is, on the newest commits of a repository.

    Args:
        job: the repository; `name` names the report's folder.
        adapter: the adapter's folder.
        fingerprint: of the base model that it was trained on, if known.
        model: the base model.
        settings: the user's.
        tell: told the progress.

    Returns:
        The result as `--json` prints it.
    """
    begun_s = time.monotonic()
    run = _prepare(job, model, settings, tell, 0, find_gpus)
    with memory.out_of_memory(run.device):
        measurements = _check(adapter, fingerprint, model)
        adapted = None
        if not measurements.problems:
            tell("model", None, f"loading {model.name}")
            rank = peft_format.read(adapter, peft_format.layers_of(model.path)).rank
            adapted = _adapted(run, Recipe(1.0, rank=rank, alpha=rank))
            adapted.load(adapter)
            if problem := verdict.zero_scale_problem(adapted, run.examples.test):
                measurements = Measurements(problems=(problem,))
        return _evaluate(run, adapted, adapter, measurements, None, time.monotonic() - begun_s)


def _adapted(run: _Run, recipe: Recipe) -> Adapted:
    return Adapted(
        run.model,
        recipe,
        num_threads=run.job.num_threads,
        base_weights=run.base_weights,
        device=run.device.torch_name,
    )


def _check(adapter: Path, fingerprint: str | None, model: LocalModel) -> Measurements:
    if fingerprint is not None and fingerprint != peft_format.fingerprint_of(model.path):
        return Measurements(problems=(f"The adapter was trained on another model, not on {model.name}.",))
    try:
        peft_format.read(adapter, peft_format.layers_of(model.path))
    except AdapterError as error:
        return Measurements(problems=(str(error),))
    return Measurements()


def _base_on_dev(adapted: Adapted, run: _Run, leads: bool) -> tuple[list[float], float]:
    """Return the base model's losses on the dev commits, and the seconds of an example."""
    examples = run.examples.dev if leads else run.examples.dev[:2]
    begun_s = time.monotonic()
    with adapted.as_base():
        losses = [adapted.loss_sum(example) for example in examples]
    return losses, (time.monotonic() - begun_s) / max(1, len(examples))


def _training_budget(budget_s: float, used_s: float, forward_s: float, examples: Examples) -> float:
    """Return the part of the budget that the evaluation leaves, and at least half of it."""
    passes = len(verdict.SCALES) * len(examples.dev) + 2 * len(examples.test) + 2 * len(examples.general)
    # An answer is a prompt and some new tokens; for those the engine's int8 compensates.
    evaluation_s = forward_s * (passes + 2 * verdict.NUM_HOLES)
    return max(budget_s / 2, budget_s - used_s - evaluation_s)


def _train(run: _Run, adapted: Adapted, recipe: Recipe, budget_s: float, stop: Callable[[], bool]) -> Trained:
    identity = {
        "data": run.examples.digest,
        "base": peft_format.fingerprint_of(run.model.path),
        "base_weights": run.base_weights,
    }
    trainer = Trainer(
        adapted,
        recipe,
        run.examples.train,
        run.folder / "checkpoint",
        identity,
        stop,
        lambda share, message: run.tell("train", share, message),
    )
    return trainer.run(budget_s, max_steps=run.job.max_steps, resume=run.job.resume)


def _choose_and_save(
    run: _Run, adapted: Adapted, base_dev: Sequence[float], adapter: Path, problem: str | None
) -> Measurements:
    scale, table = verdict.choose_scale(
        adapted,
        run.examples.dev,
        base_dev,
        lambda share: run.tell("choose", share, "strength on the dev commits"),
    )
    if scale == 0:
        # No strength is better than the base. Save the adapter as trained, so that it can be examined.
        adapted.scale = 1.0
    shutil.rmtree(adapter, ignore_errors=True)
    adapted.save(adapter)
    problems = [problem] if problem else []
    if damage := verdict.saved_adapter_problem(adapted, adapter, run.examples.test[0]):
        problems.append(damage)
    return Measurements(problems=tuple(problems), scale=scale, dev=table)


def _evaluate(
    run: _Run,
    adapted: Adapted | None,
    adapter: Path,
    measurements: Measurements,
    trained: Trained | None,
    seconds: float,
) -> dict[str, Any]:
    """Measure on the test commits, unless the verdict is known without them; write the report."""
    begun_s = time.monotonic()
    examples = run.examples
    if adapted is not None and not measurements.problems and measurements.scale:
        num_comparisons = record_comparison(examples.test, peft_format.digest_of(adapter))
        scale, dev = measurements.scale, measurements.dev
        measurements = verdict.measure_losses(
            adapted,
            examples.test,
            examples.general,
            num_comparisons=num_comparisons,
            records=Records(run.folder / "evaluation.jsonl", _header(run, adapter)),
            tell=lambda share: run.tell("evaluate", share, "log-loss on later commits"),
        )
        measurements = replace(measurements, scale=scale, dev=dev)
        # Make room: the two engines that come next load a model each.
        adapted.release()
        if measurements.effect is not None and math.isfinite(measurements.effect.gain):
            measurements = replace(measurements, hole_results=_fill(run, adapter))
    decision = verdict.decide(measurements, run.job.limits)
    result = verdict.as_dict(measurements, decision)
    result["base_weights"] = run.base_weights
    result["training"] = _training(run, trained)
    result["seconds"] = round(seconds + time.monotonic() - begun_s, 1)
    result["peak_rss_mb"] = round(peak_rss_mb(os.getpid()))
    path = run.folder / "report.html"
    report.write(path, run.job.name, run.selection.repository, result, measurements, forced=run.job.force)
    result["report"] = str(path)
    return result


def _header(run: _Run, adapter: Path) -> dict[str, str]:
    """Return the header of the kept log-losses; delete a file of another adapter or other examples."""
    header = {
        "eval": "adapter, middle and end",
        "adapter": peft_format.digest_of(adapter),
        "data": run.examples.digest,
        "base_weights": run.base_weights,
    }
    file = run.folder / "evaluation.jsonl"
    private_folder(file.parent)
    try:
        with file.open(encoding="utf-8") as lines:
            known = json.loads(lines.readline())
    except (OSError, ValueError):
        known = None
    if known != header:
        file.unlink(missing_ok=True)
    return header


def _fill(run: _Run, adapter: Path) -> verdict.HoleResults:
    def tell(share: float) -> None:
        run.tell("evaluate", share, "suggestions with and without the adapter")

    holes = verdict.choose_holes(run.examples.test)
    with data.checked_out_tree(run.selection, run.settings) as root:
        place = root or Repository(run.job.repo).root
        return asyncio.run(
            verdict.fill(run.model, adapter, run.settings, holes, place, run.job.num_threads, tell)
        )


def _training(run: _Run, trained: Trained | None) -> dict[str, Any] | None:
    if trained is None:
        return None
    return {
        "examples": len(run.examples.train),
        "digest": run.examples.digest,
        "layout": run.examples.layout,
        "steps": trained.steps,
        "planned_steps": trained.planned,
        "seconds": trained.seconds,
        "seconds_per_step": trained.seconds_per_step,
        "tokens": trained.tokens,
        "losses": list(trained.losses),
    }


def record_comparison(test: Sequence[Example], digest: str) -> int:
    """Record that an adapter is evaluated on these commits; return the number of adapters that were."""
    file = data_folder() / "training" / "opened.json"
    # Digests, so that the file does not tell which commits a repository has.
    commits = {hashlib.sha256(example.commit.encode()).hexdigest()[:16] for example in test}
    with locked(file.parent):
        try:
            known = read_json(file)["opened"]
        except (OSError, ValueError, KeyError, TypeError):
            known = []
        others = {
            one["adapter"] for one in known if commits & set(one["commits"]) and one["adapter"] != digest
        }
        known = [one for one in known if one["adapter"] != digest]
        known.append({"adapter": digest, "commits": sorted(commits)})
        text_files.replace(file, json.dumps({"opened": known}), private=True)
    return len(others) + 1


def _num_parameters(model: LocalModel) -> int:
    return sum(outputs * inputs for outputs, inputs in peft_format.layers_of(model.path).values())
