"""An adapter that is learnt because an editor has asked for it: the question, the process, the verdict.

The user is asked first, whoever sent the command: a file of a workspace can make some editors send commands.
What learns is the process that `midfill adapter train` starts. Knows nothing of LSP. Runs on the event loop;
the process is read by a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from midfill.adapters.registry import check_name
from midfill.errors import AdapterError, MidfillError
from midfill.models import store
from midfill.settings import Settings

if TYPE_CHECKING:
    from midfill.models.store import LocalModel
    from midfill.training.job import Job
    from midfill.training.process import TrainingProcess

_TRAIN, _RESUME, _LEAVE = "Train", "Go on from the checkpoint", "Do not train"
_USE, _KEEP = "Use it", "Do not use it"

# Where the stages of the process begin and end in the whole; they begin anew for each thing that is measured.
_STAGES = {"train": (0.0, 0.5), "choose": (0.5, 0.6), "evaluate": (0.6, 1.0)}


class Editor(Protocol):
    """What is needed of the editor."""

    def say(self, sentence: str, *, failed: bool = False) -> None:
        """Show a sentence, as an error or not."""

    async def ask(self, question: str, answers: tuple[str, ...]) -> str | None:
        """Have the user choose; None if the user does not, or cannot be asked."""

    def progress(
        self, title: str, outcome: Callable[[], str], cancel: Callable[[], None]
    ) -> AbstractAsyncContextManager[Callable[[str, float | None], None]]:
        """Show how far it is; see `progress.Progress`."""


class Training:
    """The training of one server: one at a time.

    Args:
        editor: see there.
        use: has the adapter of a name used in the workspace. Raises `MidfillError`.
    """

    def __init__(self, editor: Editor, use: Callable[[str], Awaitable[None]]) -> None:
        self._editor = editor
        self._use = use
        self._process: TrainingProcess | None = None
        self._busy = False

    def stop(self) -> bool:
        """End it, with a checkpoint. Whether there was one."""
        if self._process is not None:
            self._process.stop()
        return self._process is not None

    async def plan(
        self, folder: Path | None, name: str | None, minutes: float, settings: Settings
    ) -> tuple[Job, LocalModel]:
        """What is to be done. `run` has to follow. Raises `MidfillError` if it cannot."""
        if self._busy:
            raise AdapterError("An adapter is being trained already. To end that: midfill.adapter.stop")
        if folder is None:
            raise AdapterError("No folder is open whose history an adapter could learn from.")
        self._busy = True
        try:
            return await asyncio.to_thread(_plan, folder, name, minutes, settings)
        except BaseException:
            self._busy = False
            raise

    async def run(self, job: Job, model: LocalModel, settings: Settings) -> None:
        """Ask the user, train, and say what has come of it."""
        try:
            agreed = await self._agreed(job, model)
            last = {} if agreed is None else await self._train(agreed, model, settings)
        except MidfillError as error:
            last = {"error": str(error)}
        finally:
            self._process, self._busy = None, False
        if "result" in last:
            await self._tell(last["result"])
        elif said := last.get("stopped") or last.get("error"):
            self._editor.say(said, failed="error" in last)

    async def _agreed(self, job: Job, model: LocalModel) -> Job | None:
        from midfill.training.job import can_resume  # noqa: PLC0415 - only who trains

        question = (
            f"midfill: learn an adapter for {model.name} from the git history of {job.repo}? It takes about "
            f"{job.budget_s / 60:.0f} minutes beside your work, stays on this machine, and is used only "
            "if it proves better."
        )
        answers = (_TRAIN, _RESUME, _LEAVE) if can_resume(job.name) else (_TRAIN, _LEAVE)
        chosen = await self._editor.ask(question, answers)
        return {_TRAIN: job, _RESUME: replace(job, resume=True)}.get(chosen or "")

    async def _train(self, job: Job, model: LocalModel, settings: Settings) -> dict[str, Any]:
        from midfill.training.job import request_of  # noqa: PLC0415
        from midfill.training.process import TrainingProcess  # noqa: PLC0415

        process = self._process = TrainingProcess(request_of("train", job, model, settings))
        last: dict[str, Any] = {}

        def outcome() -> str:
            return last["result"]["verdict"] if "result" in last else next(iter(last), "failed")

        try:
            async with self._editor.progress(f"midfill: adapter {job.name}", outcome, process.stop) as report:
                last |= await asyncio.to_thread(process.run, _Whole(report))
        finally:
            process.stop()
        return last

    async def _tell(self, result: dict[str, Any]) -> None:
        name, verdict = result["adapter"], result["verdict"]
        if verdict != "enabled":
            reasons = " ".join(result["reasons"])
            self._editor.say(f"The adapter {name} was judged {verdict} and stays off. {reasons}")
            return
        question = (
            f"midfill: the adapter {name} is better than its base on {result['commits']} later commits "
            f"(gain {result['nll_gain']:+.3f} nats per token). Use it in this workspace?"
        )
        if await self._editor.ask(question, (_USE, _KEEP)) == _USE:
            try:
                await self._use(name)
            except MidfillError as error:
                self._editor.say(str(error), failed=True)


class _Whole:
    """Stages as shares of one whole, which never falls: some editors take what is reported for a sum."""

    def __init__(self, report: Callable[[str, float | None], None]) -> None:
        self._report = report
        self._share = 0.0

    def __call__(self, stage: str, share: float | None, message: str) -> None:
        begin, end = _STAGES.get(stage, (0.0, 0.0))
        self._share = max(self._share, begin + (end - begin) * (share or 0.0))
        self._report(f"{stage}: {message}", self._share)


def _plan(folder: Path, name: str | None, minutes: float, settings: Settings) -> tuple[Job, LocalModel]:
    from midfill.training.job import Job, most_threads, name_for  # noqa: PLC0415

    name = name or name_for(folder)
    check_name(name)
    if (found := store.find(settings.model)) is None:
        raise MidfillError(
            f"The model {settings.model!r} is not on this machine. Run: midfill model pull {settings.model}"
        )
    return Job(folder, name, 60 * minutes, num_threads=most_threads()), found
