"""One model for all of a user's editors: the engine in its own process, started by the first editor.

It listens on a Unix socket in a folder of the user's own (mode 0700). The socket's name depends on midfill's
version, the model and the engine's settings; another model is another process. A lock lets one process start
it. If it ends, the next request starts it again. An answer that has begun breaks off; every other request is
sent once more. Runs on the event loop.
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
from filelock import AsyncFileLock, Timeout

from midfill import __version__
from midfill.engine.api import AdapterSource, LocalModel, ModelInfo, Progress, Request, Token
from midfill.engine.remote.client.endpoint import LostError, RemoteSpec
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.errors import AdapterError, EngineError, EngineUnavailableError, ModelError
from midfill.models.vocabulary import tokenizer_of
from midfill.system.private import create_private

_LOG = logging.getLogger(__name__)

_URL = "http://midfill"
_SAYS_S = 2.0
_MAX_SOCKET_CHARS = 100
"""Length of a socket's path that is allowed everywhere (108 on Linux, 104 on macOS)."""
_MAX_NAMES = 10
_MAX_STARTS = 3
_WINDOW_S = 600.0


@dataclass(frozen=True, slots=True)
class ShareSpec:
    """The engine to share.

    Attributes:
        model: the model's folder, for its vocabulary.
        arguments: of `midfill engine serve`; they identify the engine.
        deadline_s: how long to wait for a first token.
        start_s: how long to wait until the process listens, or another one has finished starting it.
    """

    model: LocalModel
    arguments: tuple[str, ...]
    deadline_s: float = 10.0
    start_s: float = 60.0


def runtime_dir() -> Path:
    """Return the folder of the sockets, private to this user. Raises `EngineError` if it is not private."""
    # Without XDG_RUNTIME_DIR, which a login sets, platformdirs warns, and its folder may be anyone's.
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
            "Set MIDFILL_RUNTIME to a folder of your own."
        ) from error
    if not is_private:
        raise EngineError(
            f"{folder} is not private to you; remove it, or set MIDFILL_RUNTIME to a folder that is."
        )
    return folder


def _in_the_temporary_folder() -> Path:
    """Return a folder there that is private to this user, or can be.

    Anybody may have taken the first name, so all processes of a user must find the same next one. A user who
    takes all names keeps this user from sharing, and gains nothing.
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
    """Return whether it is a folder (no link) that this user owns and nobody else may enter."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


class SharedEngine:
    """`Engine` that joins the shared process, and starts it if there is none.

    `start` raises `EngineError` on systems without Unix sockets.
    """

    def __init__(self, spec: ShareSpec) -> None:
        self._spec = spec
        key = json.dumps([__version__, str(spec.model.path), *spec.arguments])
        self._name = hashlib.sha256(key.encode()).hexdigest()[:12]
        self._client_id = uuid.uuid4().hex
        self._adapters: tuple[AdapterSource, ...] = ()
        self._remote: RemoteEngine | None = None
        self._pid = 0  # of the process that `_remote` was made for
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
        """Path of the process's socket. Raises `EngineError`."""
        return runtime_dir() / f"{self._name}.sock"

    async def start(self, progress: Progress) -> None:
        """Join or start the process, and wait until it has loaded the model; see `Engine.start`."""
        if not hasattr(socket, "AF_UNIX"):
            raise EngineError(
                '`engine = "shared"` needs Unix sockets, which this system does not have; use "local".'
            )
        if self._spec.model.path.is_file():
            # The vocabulary of a GGUF file takes as long as the model; `detection` finds it ready.
            loading = asyncio.ensure_future(asyncio.to_thread(tokenizer_of, self._spec.model.path))
            loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        await self._join()
        await self._wait_until_ready(progress)
        pid = await self._listener() or 0
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
        before, self._remote, self._pid = self._remote, remote, pid
        if before is not None:
            await before.close()

    async def generate(self, request: Request) -> AsyncGenerator[Token, None]:
        """Yield tokens. A request without a token so far may be sent once more; see `Engine.generate`.

        It is if the process has ended; if another window has started it again, so that it does not have this
        window's adapters; or if only the connection has ended, which the process may close when it is idle.
        """
        begun = False
        try:
            async with aclosing(self._connected().generate(request)) as tokens:
                async for token in tokens:
                    begun = True
                    yield token
        except EngineError as error:
            if self._closed:
                raise
            pid = await self._listener()
            if pid in {0, self._pid} and not isinstance(error, LostError):
                raise
            restart = self._restart_process() if pid != self._pid else None
            if begun:
                raise
            if restart is not None:
                await asyncio.shield(restart)
        else:
            return
        async with aclosing(self._connected().generate(request)) as tokens:
            async for token in tokens:
                yield token

    def prewarm(self, tokens: Sequence[int], adapter: str | None = None, *, user: str = "") -> None:
        """Compute a prompt when idle; see `Engine.prewarm`."""
        if self._remote is not None:
            self._remote.prewarm(tokens, adapter, user=user)

    async def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Set the adapters of this client, beside those of others; see `Adaptable.set_adapters`."""
        await self._send_adapters(adapters)
        self._adapters = tuple(adapters)

    async def _send_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Send the adapters to the process. Raises `AdapterError` with its message."""
        wanted = [{"key": one.key, "name": one.name, "path": str(one.path)} for one in adapters]
        async with self._client() as client:
            body = {"client": self._client_id, "pid": os.getpid(), "adapters": wanted}
            try:
                answer = await client.post("/midfill/adapters", json=body)
                if answer.status_code != 204:
                    raise AdapterError(str(answer.json()["error"]["message"]))
            except (httpx2.HTTPError, ValueError, KeyError) as error:
                raise AdapterError("The shared engine did not load the adapters; try again.") from error

    def _client(self) -> httpx2.AsyncClient:
        transport = httpx2.AsyncHTTPTransport(uds=str(self.socket))
        return httpx2.AsyncClient(transport=transport, base_url=_URL, timeout=None)

    async def close(self) -> None:
        """Disconnect; the process stays for others until it has been idle for long. See `Engine.close`."""
        self._closed = True
        if self._adapters and await self._listener():
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
        """Start to join or restart the process, unless that has begun."""
        if self._restart is None or self._restart.done():
            self._restart = asyncio.get_running_loop().create_task(self.start(lambda _message, _share: None))
            self._restart.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._restart

    async def _listener(self) -> int | None:
        """Return the id of the process that answers at the socket: None for no process, 0 if it does not say.

        A connection alone proves nothing: when a process is killed, the kernel may close its connections
        first and its listening socket a moment later.
        """
        async with self._client() as client:
            try:
                async with asyncio.timeout(_SAYS_S):
                    answer = await client.get("/health")
                return int(answer.json()["pid"])
            except httpx2.TransportError:
                return None
            except (TimeoutError, ValueError, KeyError):
                return 0

    async def _join(self) -> None:
        """Start the process unless one listens. One process at a time looks and starts.

        Raises `EngineUnavailableError`, also if another process does not finish.
        """
        lock = AsyncFileLock(str(self.socket.with_suffix(".lock")), timeout=self._spec.start_s)
        try:
            await lock.acquire()
        except Timeout as error:
            raise EngineUnavailableError(
                "Another midfill process has been starting the shared engine for more than "
                f'{self._spec.start_s:g} s. End that process, or set `engine = "local"`. See {self._log}.'
            ) from error
        try:
            if await self._listener() is not None:
                return
            now = time.monotonic()
            if len(self._starts) == _MAX_STARTS and now - self._starts[0] < _WINDOW_S:
                raise EngineUnavailableError(
                    f"The shared engine ended {_MAX_STARTS} times within {_WINDOW_S / 60:.0f} minutes and "
                    f'will not be restarted for a while. See {self._log}, or set `engine = "local"`.'
                )
            self._starts.append(now)
            await self._launch()
        finally:
            await lock.release()

    @property
    def _log(self) -> Path:
        return self.socket.with_suffix(".log")

    async def _launch(self) -> None:
        """Start the process; return when it listens. It outlives this one."""
        command = (sys.executable, "-P", "-m", "midfill", "engine", "serve", "--socket", str(self.socket))
        with create_private(self._log) as log:
            # asyncio kills its children when it ends, so this child starts a grandchild (--detach).
            process = await asyncio.create_subprocess_exec(
                *(*command, "--detach", *self._spec.arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                # Not the workspace's folder, which would stay in use.
                cwd=self.socket.parent,
            )
        if process.stdout is None:
            raise AssertionError("stdout is a pipe")
        try:
            line = await asyncio.wait_for(process.stdout.readline(), self._spec.start_s)
        except TimeoutError:
            line = b""
        await process.wait()
        if not line.startswith(b"unix:"):
            raise EngineUnavailableError(f"The shared engine did not start; see {self._log}.")
        _LOG.info("started the shared engine")

    async def _wait_until_ready(self, progress: Progress) -> None:
        """Report the progress of loading. Raises `ModelError` with the process's message."""
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
                    f"The shared engine ended while it loaded the model; see {self._log}."
                ) from error
        raise EngineUnavailableError("The shared engine ended while it loaded the model.")
