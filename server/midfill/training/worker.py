"""The training process: started as `python -P -m midfill.training.worker FILE`, or by torchrun.

FILE holds the job as JSON. Events are written to stdout, one JSON object a line: {"stage", "share",
"message"} while it works, at the end {"result"}, {"error"} or {"stopped"}. Of several processes only the
first one writes. SIGINT and SIGTERM end it with a checkpoint. It runs at the lowest priority, and pauses
while a server on this machine answers a user. `process` starts it and reads its events.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from midfill.adapters.registry import check_name
from midfill.errors import AdapterError, MidfillError
from midfill.models.store import LocalModel
from midfill.settings import Settings
from midfill.system.json_files import read_json
from midfill.system.private import private_folder
from midfill.training.job import RENDEZVOUS, Job, Limits, run_folder


def main() -> None:
    """Run the job of the file that is the first argument."""
    if os.environ.get("RANK", "0") == "0":
        with open(os.dup(1), "w", encoding="utf-8", closefd=True) as out:  # noqa: PTH123 - it is a descriptor
            # Libraries print to stdout too: send that to stderr, so that stdout has the events only.
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
    from midfill.training import pipeline

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
            return pipeline.evaluate(
                job, Path(request["adapter"]), request["fingerprint"], model, settings, tell
            )
    # Join the group before taking the lock: when the first process fails, the others must notice and end.
    with process_group() as leads, _alone(job.name) if leads else contextlib.nullcontext():
        return pipeline.train(job, model, settings, tell, stop, leads=leads)


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Lock the folder of a run. Raises `AdapterError` if another process uses it."""
    folder = run_folder(name)
    private_folder(folder.parent)
    private_folder(folder)
    lock = FileLock(folder / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise AdapterError(
            f"The adapter {name!r} is being trained or evaluated by another midfill process. Wait for it to "
            "finish, or use another --name."
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the process group, ours or that of torch's launcher; give whether this is the first process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    from torch import distributed

    meeting = os.environ.get(RENDEZVOUS)
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
        return  # Keep the present priority.


if __name__ == "__main__":
    main()
