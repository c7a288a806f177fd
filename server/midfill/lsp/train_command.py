"""Train an adapter at an editor's request: ask the user, run the process, show the verdict.

The user is always asked first: a file of a workspace can make some editors send commands. Training runs in
the same process that `midfill adapter train` starts. Knows nothing of LSP. Runs on the event loop; a thread
reads the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midfill.adapters.registry import check_name
from midfill.errors import AdapterError, MidfillError
from midfill.lsp.dialogs import Dialogs
from midfill.models import store
from midfill.settings import Settings

if TYPE_CHECKING:
    from midfill.models.store import LocalModel
    from midfill.training.job import Job
    from midfill.training.process import TrainingProcess

_TRAIN, _RESUME, _LEAVE = "Train", "Resume from the checkpoint", "Do not train"
_USE, _KEEP = "Use it", "Do not use it"

# The range of each stage in the progress of the whole. A stage reports from 0 to 1 several times, once for
# each thing that it measures.
_STAGES = {"train": (0.0, 0.5), "choose": (0.5, 0.6), "evaluate": (0.6, 1.0)}


class AdapterTraining:
    """Trains adapters for one server, one at a time.

    Args:
        dialogs: the editor's window.
        use: binds the adapter of a name to the workspace. Raises `MidfillError`.
    """

    def __init__(self, dialogs: Dialogs, use: Callable[[str], Awaitable[None]]) -> None:
        self._dialogs = dialogs
        self._use = use
        self._process: TrainingProcess | None = None
        self._is_busy = False

    def stop(self) -> bool:
        """Stop a running training, which leaves a checkpoint. Return whether one was running."""
        if self._process is not None:
            self._process.stop()
        return self._process is not None

    async def plan(
        self, folder: Path | None, name: str | None, minutes: float, settings: Settings
    ) -> tuple[Job, LocalModel]:
        """Return the job and its model; `run` has to follow. Raises `MidfillError` if it cannot be done."""
        if self._is_busy:
            raise AdapterError("An adapter is already being trained. Stop it first: midfill.adapter.stop")
        if folder is None:
            raise AdapterError("No folder is open. Open the repository to train on.")
        self._is_busy = True
        try:
            return await asyncio.to_thread(_plan, folder, name, minutes, settings)
        except BaseException:
            self._is_busy = False
            raise

    async def run(self, job: Job, model: LocalModel, settings: Settings) -> None:
        """Ask the user, train, and show the verdict."""
        try:
            confirmed = await self._confirm(job, model)
            last = {} if confirmed is None else await self._train(confirmed, model, settings)
        except MidfillError as error:
            last = {"error": str(error)}
        finally:
            self._process, self._is_busy = None, False
        if "result" in last:
            await self._show_verdict(last["result"])
        elif "stopped" in last:
            self._dialogs.show_info(last["stopped"])
        elif "error" in last:
            self._dialogs.show_error(last["error"])

    async def _confirm(self, job: Job, model: LocalModel) -> Job | None:
        from midfill.training.job import can_resume

        question = (
            f"train an adapter for {model.name} on the git history of {job.repo}? This takes about "
            f"{job.budget_s / 60:.0f} minutes in the background. The adapter stays on this machine and is "
            "used only if it proves better than the model alone."
        )
        answers = (_TRAIN, _RESUME, _LEAVE) if can_resume(job.name) else (_TRAIN, _LEAVE)
        chosen = await self._dialogs.ask(question, answers)
        return {_TRAIN: job, _RESUME: replace(job, resume=True)}.get(chosen or "")

    async def _train(self, job: Job, model: LocalModel, settings: Settings) -> dict[str, Any]:
        from midfill.training.job import request_of
        from midfill.training.process import TrainingProcess

        process = self._process = TrainingProcess(request_of("train", job, model, settings))
        last: dict[str, Any] = {}

        def outcome() -> str:
            return last["result"]["verdict"] if "result" in last else next(iter(last), "failed")

        try:
            async with self._dialogs.progress(f"adapter {job.name}", outcome, process.stop) as report:
                last |= await asyncio.to_thread(process.run, _TotalProgress(report))
        finally:
            process.stop()
        return last

    async def _show_verdict(self, result: dict[str, Any]) -> None:
        name, verdict = result["adapter"], result["verdict"]
        if verdict != "enabled":
            reasons = " ".join(result["reasons"])
            self._dialogs.show_info(
                f"The adapter {name} has the verdict {verdict!r} and is not used. {reasons}"
            )
            return
        question = (
            f"the adapter {name} is better than its base model on {result['commits']} later commits "
            f"(log-loss lower by {result['nll_gain']:.3f} nats per token). Use it in this workspace?"
        )
        if await self._dialogs.ask(question, (_USE, _KEEP)) == _USE:
            try:
                await self._use(name)
            except MidfillError as error:
                self._dialogs.show_error(str(error))


class _TotalProgress:
    """Map the progress of stages to one total that never falls: some editors add up what is reported."""

    def __init__(self, report: Callable[[str, float | None], None]) -> None:
        self._report = report
        self._share = 0.0

    def __call__(self, stage: str, share: float | None, message: str) -> None:
        begin, end = _STAGES.get(stage, (0.0, 0.0))
        self._share = max(self._share, begin + (end - begin) * (share or 0.0))
        self._report(f"{stage}: {message}", self._share)


def _plan(folder: Path, name: str | None, minutes: float, settings: Settings) -> tuple[Job, LocalModel]:
    from midfill.training.job import Job, most_threads, name_for

    name = name or name_for(folder)
    check_name(name)
    if (found := store.find(settings.model)) is None:
        raise MidfillError(
            f"The model {settings.model!r} is not on this machine. Run: midfill model pull {settings.model}"
        )
    return Job(folder, name, 60 * minutes, num_threads=most_threads()), found
