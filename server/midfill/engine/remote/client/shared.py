"""One model for all of a user's editors: the engine in a process of its own, started by whoever comes first.

It listens on a Unix socket in a folder of the user's own (mode 0700), whose name says midfill's version, the
model and how it runs; another model is another process. A lock lets one process start it. A crash costs the
requests under way; the next one finds it started anew. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import httpx2
import platformdirs
from filelock import AsyncFileLock

from midfill import __version__
from midfill.engine.api import AdapterSource, LocalModel, ModelInfo, Progress, Request, Token
from midfill.engine.remote.client.endpoint import RemoteSpec
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.errors import AdapterError, EngineError, EngineUnavailableError, ModelError
from midfill.system.private import create_private

_LOG = logging.getLogger(__name__)

_URL = "http://midfill"
_LISTENS_S = 60.0
_MAX_SOCKET_CHARS = 100
"""What fits into a socket's address everywhere (108 on Linux, 104 on macOS)."""
_MAX_NAMES = 10
_MAX_STARTS = 3
_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class ShareSpec:
    """Which engine to share.

    Attributes:
        model: the model's folder, for its vocabulary.
        arguments: of `midfill engine serve`, which make the engine what it is.
        deadline_s: how long to wait for a first token.
    """

    model: LocalModel
    arguments: tuple[str, ...]
    deadline_s: float = 10.0


def runtime_dir() -> Path:
    """The folder of the sockets: this user's alone. Raises `EngineError` if it is not."""
    # Without XDG_RUNTIME_DIR, which a login sets, platformdirs warns and names a folder that may be anyone's.
    private = sys.platform != "linux" or "XDG_RUNTIME_DIR" in os.environ
    if named := os.environ.get("MIDFILL_RUNTIME"):
        folder = Path(named)
    elif private:
        folder = platformdirs.user_runtime_path("midfill")
    else:
        folder = _in_the_temporary_folder()
    if len(str(folder)) > _MAX_SOCKET_CHARS - 24:
        folder = _in_the_temporary_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_private = _is_private(folder)
    except OSError as error:
        raise EngineError(
            f"Cannot make {folder} for the shared engine: {error.strerror}. "
            "Set MIDFILL_RUNTIME to a folder of yours."
        ) from error
    if not is_private:
        raise EngineError(
            f"{folder} is not yours alone; remove it, or set MIDFILL_RUNTIME to a folder that is."
        )
    return folder


def _in_the_temporary_folder() -> Path:
    """A folder there that is this user's, or can be.

    Anybody may have taken the first name, so that a user's processes must all find the next one. Who takes
    all of them keeps the user from sharing, and gets nothing.
    """
    names = [f"midfill-{os.getuid()}", *(f"midfill-{os.getuid()}-{n}" for n in range(2, _MAX_NAMES + 1))]
    folders = [Path(tempfile.gettempdir()) / name for name in names]
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            if _is_private(folder):
                return folder
    return folders[0]


def _is_private(folder: Path) -> bool:
    """Whether it is a folder, no link, that this user owns and nobody else may enter."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


class SharedEngine:
    """`Engine` that joins the shared process, and starts it where there is none.

    Raises `EngineError` from `start` on systems without Unix sockets.
    """

    def __init__(self, spec: ShareSpec) -> None:
        self._spec = spec
        key = json.dumps([__version__, str(spec.model.path), *spec.arguments])
        self._name = hashlib.sha256(key.encode()).hexdigest()[:12]
        self._client_id = uuid.uuid4().hex
        self._adapters: tuple[AdapterSource, ...] = ()
        self._remote: RemoteEngine | None = None
        self._restart: asyncio.Task[None] | None = None
        self._starts: deque[float] = deque(maxlen=_MAX_STARTS)
        self._closed = False

    @property
    def model(self) -> ModelInfo:
        """The model of the shared process; see `Engine.model`."""
        if self._remote is None:
            raise EngineUnavailableError("The shared engine has not been reached yet.")
        return self._remote.model

    @property
    def socket(self) -> Path:
        """Where it listens. Raises `EngineError`."""
        return runtime_dir() / f"{self._name}.sock"

    async def start(self, progress: Progress) -> None:
        """Join the process or start it, and wait until it has loaded the model; see `Engine.start`."""
        if not hasattr(socket, "AF_UNIX"):
            raise EngineError(
                '`engine = "shared"` needs Unix sockets, which this system has not; use "local".'
            )
        await self._join()
        await self._wait_until_ready(progress)
        remote = RemoteEngine(
            RemoteSpec(
                (_URL,),
                api="midfill",
                candidates=(self._spec.model,),
                first_token_s=self._spec.deadline_s,
                socket=self.socket,
            )
        )
        await remote.start(lambda _message, _share: None)
        if self._adapters:
            await self._send_adapters(self._adapters)
        if self._closed:
            await remote.close()
            return
        before, self._remote = self._remote, remote
        if before is not None:
            await before.close()

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """See `Engine.generate`. A request that finds no process starts it, and is asked again once."""
        begun = False
        try:
            async with aclosing(self._connected().generate(request)) as tokens:
                async for token in tokens:
                    begun = True
                    yield token
        except EngineUnavailableError:
            if self._closed or await self._is_listening():
                raise
            restart = self._restart_process()
            if begun:
                raise
            await asyncio.shield(restart)
        else:
            return
        async with aclosing(self._connected().generate(request)) as tokens:
            async for token in tokens:
                yield token

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """See `Engine.prewarm`."""
        if self._remote is not None:
            self._remote.prewarm(tokens, adapter, user=user)

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """See `Adaptable.set_adapters`. Other windows have theirs beside them."""
        await self._send_adapters(adapters)
        self._adapters = tuple(adapters)

    async def _send_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Tell the process. Raises `AdapterError` with its words."""
        wanted = [{"key": one.key, "name": one.name, "path": str(one.path)} for one in adapters]
        async with self._client() as client:
            body = {"client": self._client_id, "pid": os.getpid(), "adapters": wanted}
            try:
                answer = await client.post("/midfill/adapters", json=body)
                if answer.status_code != 204:
                    raise AdapterError(str(answer.json()["error"]["message"]))
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                raise AdapterError("The shared engine did not take the adapters; try again.") from error

    def _client(self) -> httpx2.AsyncClient:
        transport = httpx2.AsyncHTTPTransport(uds=str(self.socket))
        return httpx2.AsyncClient(transport=transport, base_url=_URL, timeout=None)

    async def close(self) -> None:
        """Hang up. The process stays for others, until it has been idle for long. See `Engine.close`."""
        self._closed = True
        if self._adapters and await self._is_listening():
            with contextlib.suppress(AdapterError, TimeoutError):
                await asyncio.wait_for(self._send_adapters(()), 1)
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        if self._remote is not None:
            await self._remote.close()

    def _connected(self) -> RemoteEngine:
        if self._remote is None:
            raise EngineUnavailableError("The shared engine has not been reached yet.")
        return self._remote

    def _restart_process(self) -> asyncio.Task[None]:
        """Begin to start it anew, unless that is under way."""
        if self._restart is None or self._restart.done():
            self._restart = asyncio.get_running_loop().create_task(self.start(lambda _message, _share: None))
            self._restart.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._restart

    async def _is_listening(self) -> bool:
        """Whether somebody listens."""
        try:
            _, writer = await asyncio.open_unix_connection(str(self.socket))
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    async def _join(self) -> None:
        """See that somebody listens. One process at a time looks and starts."""
        async with AsyncFileLock(str(self.socket.with_suffix(".lock")), timeout=_LISTENS_S):
            if await self._is_listening():
                return
            now = time.monotonic()
            if len(self._starts) == _MAX_STARTS and now - self._starts[0] < _WINDOW_S:
                raise EngineUnavailableError(
                    f"The shared engine ended {_MAX_STARTS} times within {_WINDOW_S / 60:.0f} minutes and is "
                    f'left alone for a while. {self._log} may say why; `engine = "local"` does without it.'
                )
            self._starts.append(now)
            await self._launch()

    @property
    def _log(self) -> Path:
        return self.socket.with_suffix(".log")

    async def _launch(self) -> None:
        """Start the process; returns when it listens. It outlives this one."""
        command = (sys.executable, "-P", "-m", "midfill", "engine", "serve", "--socket", str(self.socket))
        with create_private(self._log) as log:
            # asyncio kills its children when it ends, so this one has a child in its turn (--detach).
            process = await asyncio.create_subprocess_exec(
                *(*command, "--detach", *self._spec.arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                # Not the workspace's folder, which would be kept in use.
                cwd=self.socket.parent,
            )
        if process.stdout is None:
            raise AssertionError("stdout is a pipe")
        try:
            line = await asyncio.wait_for(process.stdout.readline(), _LISTENS_S)
        except TimeoutError:
            line = b""
        await process.wait()
        if not line.startswith(b"unix:"):
            raise EngineUnavailableError(f"The shared engine did not start; {self._log} says why.")
        _LOG.info("started the shared engine")

    async def _wait_until_ready(self, progress: Progress) -> None:
        """Pass on how loading goes. Raises `ModelError` with what the process says if it cannot."""
        async with self._client() as client:
            try:
                async with client.stream("GET", "/midfill/ready") as response:
                    async for line in response.aiter_lines():
                        report = json.loads(line)
                        if "error" in report:
                            raise ModelError(report["error"])
                        if report.get("ready"):
                            return
                        progress(str(report["message"]), report["share"])
            except httpx2.TransportError as error:
                raise EngineUnavailableError(
                    f"The shared engine ended while it loaded the model; {self._log} may say why."
                ) from error
        raise EngineUnavailableError("The shared engine ended while it loaded the model.")
