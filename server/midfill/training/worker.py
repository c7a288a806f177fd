"""The process that trains and judges: started as `python -P -m midfill.training.worker FILE`, or by torchrun.

FILE holds the job as JSON. What happens is written to stdout, a JSON object a line: {"stage", "share",
"message"} while it works, at the end {"result"} or {"error"} or {"stopped"}. Of several processes only the
first one writes. SIGINT and SIGTERM end it with a checkpoint. It runs at the lowest priority, and stands
aside while a server on this machine computes for somebody.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from midfill.adapters.registry import check_name, data_dir, is_name
from midfill.errors import AdapterError, MidfillError
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.system.json_files import read_json
from midfill.system.private import private_folder
from midfill.training.judge import Limits

_MODULE = "midfill.training.worker"
# Helpers of torch that wait for each other by spinning would take the time of programs that have work.
_PASSIVE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_MAX_ERROR_CHARS = 2000
_MEETING = "MIDFILL_MEETING"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done.

    Attributes:
        repo: a folder in the repository.
        name: of the adapter in the registry.
        budget_s: for training and judging.
        resume: go on from the checkpoint.
        force: use it whatever the verdict; recorded and shown.
        num_threads: for computing.
        max_steps: fixes the schedule, for tests; None goes by the budget.
        changes: of the recipe, for tests.
        limits: of the judgement.
        seed: of the examples.
        base_weights: how the base is held, "auto" for what fits into the memory that is free; see `memory`.
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
    """The folder of a training."""
    return data_dir() / "training" / name


def can_resume(name: str) -> bool:
    """Whether a training of that name has left a checkpoint."""
    return any((run_folder(name) / folder).is_dir() for folder in ("checkpoint", "checkpoint.old"))


def name_for(folder: Path) -> str:
    """A name that an adapter can have, from a folder's: of a repository, or of an adapter that is in none."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")[:64]
    # The hub's snapshots are called by digests.
    return name if is_name(name) else f"adapter-{name}".rstrip("-")[:64]


def most_threads() -> int:
    """All cores but one, which stays free for the editor and its servers."""
    from midfill.engine.torch.threads import num_cores  # noqa: PLC0415 - only where somebody trains

    return max(1, num_cores() - 1)


@contextmanager
def started(request: Mapping[str, Any], num_processes: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """The first process for a request, its events on `stdout`; all have ended when the context has.

    Several processes meet by a file, and talk over the loopback interface only.
    """
    with tempfile.TemporaryDirectory(prefix="midfill-job-") as folder, contextlib.ExitStack() as running:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", "-X", "utf8", "-m", _MODULE, str(file)]
        meeting = {"WORLD_SIZE": str(num_processes), _MEETING: str(Path(folder) / "meeting")}
        processes = []
        for rank in range(num_processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": _LOOPBACK}
            process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                command,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_PASSIVE, **(meeting | place if num_processes > 1 else {})},
            )
            processes.append(running.enter_context(process))
        try:
            yield processes[0]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()


def events(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """What the process says. Raises `MidfillError` if it ends without having said how."""
    assert process.stdout is not None  # noqa: S101 - for the type checker
    assert process.stderr is not None  # noqa: S101
    said: list[bytes] = []
    # Read aside, so that a full pipe stops nothing.
    reader = threading.Thread(target=lambda: said.append(process.stderr.read()), daemon=True)  # type: ignore[union-attr]
    reader.start()
    last: dict[str, Any] = {}
    for line in process.stdout:
        try:
            last = json.loads(line)
        except ValueError:
            continue  # a library that prints
        yield last
    process.wait()
    if not {"result", "error", "stopped"} & set(last):
        reader.join(timeout=5)
        text = b"".join(said).decode("utf-8", "replace").strip()[-_MAX_ERROR_CHARS:]
        raise MidfillError(
            f"The process that trains has ended by itself (status {process.returncode}). {text}"
        )


class Process:
    """A job for somebody who does other things meanwhile: `run` is for a thread, `stop` for any.

    Args:
        request: see `request_of`.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request = request
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, tell: Callable[[str, float | None, str], None]) -> dict[str, Any]:
        """The last event: {"result"}, {"error"} or {"stopped"}. Raises `MidfillError` as `events` does."""
        last: dict[str, Any] = {"stopped": "Stopped before it began."}
        with contextlib.ExitStack() as stack:
            with self._lock:
                if self._stopped:
                    return last
                self._process = stack.enter_context(started(self._request))
            for event in events(self._process):
                last = event
                if "stage" in event:
                    tell(event["stage"], event["share"], event["message"])
        return last

    def stop(self) -> None:
        """End it, with a checkpoint if it has begun to learn."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()


def request_of(  # noqa: PLR0913, PLR0917 - each is a different thing
    kind: str,
    job: Job,
    model: LocalModel,
    settings: Settings,
    adapter: Path | None = None,
    fingerprint: str | None = None,
) -> dict[str, Any]:
    """A job as JSON."""
    return {
        "kind": kind,
        "job": {**asdict(job), "repo": str(job.repo)},
        "model": {**asdict(model), "path": str(model.path)},
        "settings": settings.model_dump(),
        "adapter": None if adapter is None else str(adapter),
        "fingerprint": fingerprint,
    }


def main() -> None:
    """See the module."""
    if os.environ.get("RANK", "0") == "0":
        with open(os.dup(1), "w", encoding="utf-8", closefd=True) as out:  # noqa: PTH123 - it is a descriptor
            # What a library prints must not get between the events.
            os.dup2(2, 1)
            _serve(lambda event: print(json.dumps(event), file=out, flush=True))
    else:
        _serve(lambda _event: None)


def _serve(say: Callable[[dict[str, Any]], None]) -> None:
    request = read_json(Path(sys.argv[1]))
    _be_nice()
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    try:
        result = _work(
            request,
            lambda *event: say(dict(zip(("stage", "share", "message"), event, strict=True))),
            stopping.is_set,
        )
    except MidfillError as error:
        say({"stopped" if stopping.is_set() else "error": str(error)})
    else:
        say({"result": result})


def _work(request: Mapping[str, Any], tell: Any, stop: Callable[[], bool]) -> dict[str, Any]:
    values = request["job"]
    check_name(values["name"])
    from midfill.training import pipeline as learn  # noqa: PLC0415 - imports torch, after the process has become nice

    job = Job(
        **values
        | {
            "repo": Path(values["repo"]),
            "limits": Limits(**values["limits"]),
            "changes": tuple((key, value) for key, value in values["changes"]),
        }
    )
    model = LocalModel(**request["model"] | {"path": Path(request["model"]["path"])})
    lists = {key: tuple(one) if isinstance(one, list) else one for key, one in request["settings"].items()}
    settings = Settings.model_validate(lists)
    if request["kind"] == "eval":
        with _alone(job.name):
            return learn.evaluate(
                job, Path(request["adapter"]), request["fingerprint"], model, settings, tell
            )
    # They meet first: who is left by the first one ends too, but not who waits for it.
    with together() as leads, _alone(job.name) if leads else contextlib.nullcontext():
        return learn.train(job, model, settings, tell, stop, leads=leads)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Keep others from the folder of a run. Raises `AdapterError` if one is at work there."""
    folder = run_folder(name)
    private_folder(folder.parent)
    private_folder(folder)
    lock = FileLock(folder / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AdapterError(
            f"The adapter {name!r} is being learnt or judged by another midfill. Wait for that, or take "
            "another --name."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def together() -> Iterator[bool]:
    """Meet the other processes, ours or those of torch's launcher; whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    from torch import distributed  # noqa: PLC0415 - heavy

    meeting = os.environ.get(_MEETING)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}" if meeting else "env://",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        yield distributed.get_rank() == 0
    finally:
        distributed.destroy_process_group()


def _be_nice() -> None:
    try:
        if sys.platform == "win32":
            psutil.Process().nice(psutil.IDLE_PRIORITY_CLASS)
        else:
            psutil.Process().nice(19)
    except (OSError, psutil.Error):
        return  # It goes on at the priority that it has.


if __name__ == "__main__":
    main()
