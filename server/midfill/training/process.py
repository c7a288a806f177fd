"""Start the training process (`worker`) and read its events. For the command line and the language server.

Imports no torch. `TrainingProcess.run` is for a thread, `TrainingProcess.stop` for any thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from midfill.errors import MidfillError
from midfill.training.job import RENDEZVOUS

_MODULE = "midfill.training.worker"
# Keep torch's helper threads from spinning while they wait: other programs need the CPU.
_PASSIVE = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_MAX_ERROR_CHARS = 2000
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@contextmanager
def started(request: Mapping[str, Any], num_processes: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Start the processes of a request, give the first one, and end all of them with the context.

    The first one writes its events to `stdout`. Several processes find each other by a file, and communicate
    over the loopback interface only.
    """
    with tempfile.TemporaryDirectory(prefix="midfill-job-") as folder, contextlib.ExitStack() as running:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-P", "-X", "utf8", "-m", _MODULE, str(file)]
        meeting = {"WORLD_SIZE": str(num_processes), RENDEZVOUS: str(Path(folder) / "meeting")}
        processes = []
        for rank in range(num_processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": _LOOPBACK}
            process = subprocess.Popen(
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
    """Iterate over the events of a process. Raises `MidfillError` if it ends without a final event."""
    assert process.stdout is not None
    assert process.stderr is not None
    said: list[bytes] = []
    # Read by a thread, so that a full pipe does not stop the process.
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
        raise MidfillError(f"The training process ended unexpectedly (status {process.returncode}). {text}")


class TrainingProcess:
    """One training process: `run` blocks its thread, `stop` may be called by any thread.

    Args:
        request: from `job.request_of`.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self._request = request
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, tell: Callable[[str, float | None, str], None]) -> dict[str, Any]:
        """Run to the end; return the last event: {"result"}, {"error"} or {"stopped"}.

        `tell` is called with stage, share done and message. Raises `MidfillError` as `events` does.
        """
        last: dict[str, Any] = {"stopped": "The training was stopped before it began."}
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
        """Terminate the process, which writes a checkpoint if training has begun."""
        with self._lock:
            self._stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
