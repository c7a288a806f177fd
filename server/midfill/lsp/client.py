"""A small LSP client over stdio that drives the real server for the demo, evaluations and benchmarks.

Messages are plain dictionaries, so that it needs none of the server's types. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from midfill.errors import MidfillError
from midfill.lsp.framing import to_frame
from midfill.lsp.messages import OWN_CLIENT, TEST_HOOKS

# -P: Python must not search the current folder for modules.
SERVE_COMMAND = (sys.executable, "-P", "-m", "midfill", "serve")

_EXIT_S = 5.0


class ServerError(MidfillError):
    """The server answered a request with an error, or has ended.

    Attributes:
        code: the JSON-RPC error code; 0 if the server has ended.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def encode(message: Any) -> bytes:
    """Return a message as a frame."""
    return to_frame(json.dumps(message).encode())


async def read_message(stream: asyncio.StreamReader) -> Any:
    """Return the next message, or None when the server has closed its output."""
    try:
        header = await stream.readuntil(b"\r\n\r\n")
        length = int(header.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return json.loads(await stream.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


class Client:
    """One server process and the connection to it. Make it with `start`.

    Attributes:
        on_notification: called with the method and the params of each notification.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.on_notification: Callable[[str, Any], None] = lambda _method, _params: None
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls,
        command: Sequence[str] = SERVE_COMMAND,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stderr: int | None = asyncio.subprocess.DEVNULL,
    ) -> Client:
        """Start a server process, with the requests that only tests and benchmarks send.

        `env` replaces this process's environment.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            cwd=cwd,
            env={**(os.environ if env is None else env), TEST_HOOKS: "1"},
        )
        return cls(process)

    async def initialize(
        self,
        options: Mapping[str, Any] | None = None,
        name: str = OWN_CLIENT,
        folder: Path | None = None,
    ) -> Any:
        """Initialize the server, which then loads its model. Returns the result, with its capabilities.

        Under any `name` but `OWN_CLIENT`, accepted suggestions count in the user's acceptance statistics.
        `folder` is the workspace; None: there is none.
        """
        params = {
            "processId": None,
            "clientInfo": {"name": name},
            "rootUri": None,
            "capabilities": {
                "general": {"positionEncodings": ["utf-16"]},
                "window": {"workDoneProgress": True},
                "textDocument": {"inlineCompletion": {}},
            },
            "initializationOptions": options,
            "workspaceFolders": [{"uri": folder.as_uri(), "name": folder.name}] if folder else None,
        }
        result = await self.request("initialize", params)
        self.notify("initialized", {})
        return result

    async def load(
        self,
        options: Mapping[str, Any] | None = None,
        report: Callable[[str], None] = lambda _message: None,
        timeout_s: float = 300.0,
        folder: Path | None = None,
        name: str = OWN_CLIENT,
    ) -> None:
        """Initialize the server and wait until it has loaded its model; `report` gets its progress.

        Raises `MidfillError` with the server's own message if it cannot, or when `timeout_s` is over.
        """
        loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_notification(method: str, params: Any) -> None:
            if loaded.done():
                return
            if method == "window/showMessage":
                loaded.set_exception(MidfillError(params["message"]))
            elif method == "$/progress" and params["value"]["kind"] == "end":
                loaded.set_result(None)
            elif method == "$/progress" and params["value"].get("message"):
                report(params["value"]["message"])

        self.on_notification = on_notification
        await self.initialize(options, name, folder)
        try:
            await asyncio.wait_for(loaded, timeout_s)
        except TimeoutError:
            raise MidfillError(f"The server did not load its model within {timeout_s:.0f} s.") from None

    def send_request(self, method: str, params: Any) -> tuple[int, asyncio.Future[Any]]:
        """Send a request. Return its id and the future of its result, which may raise `ServerError`."""
        id_ = next(self._ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[id_] = future
        self._send({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})
        return id_, future

    async def request(self, method: str, params: Any) -> Any:
        """Send a request and wait for its result. Raises `ServerError`."""
        return await self.send_request(method, params)[1]

    def notify(self, method: str, params: Any) -> None:
        """Send a notification."""
        self._send({"jsonrpc": "2.0", "method": method, "params": params})

    def cancel(self, id_: int) -> None:
        """Ask the server to cancel a request; it still sends a response."""
        self.notify("$/cancelRequest", {"id": id_})

    async def close(self) -> int:
        """Shut the server down, kill it if it does not end, and return its exit status."""
        with contextlib.suppress(ServerError, TimeoutError, ConnectionError):
            await asyncio.wait_for(self.request("shutdown", None), _EXIT_S)
            self.notify("exit", None)
        try:
            status = await asyncio.wait_for(self.process.wait(), _EXIT_S)
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        await self._reader
        return status

    def _send(self, message: Any) -> None:
        stdin = self.process.stdin
        if stdin is None or stdin.is_closing():
            raise ServerError(0, "The server has ended.")
        stdin.write(encode(message))

    async def _read(self) -> None:
        stdout = self.process.stdout
        if stdout is None:
            return
        while (message := await read_message(stdout)) is not None:
            self._receive(message)
        for future in self._pending.values():
            if not future.done():
                future.set_exception(ServerError(0, "The server ended before it answered."))

    def _receive(self, message: dict[str, Any]) -> None:
        if "method" in message:
            if "id" in message:
                self._send({"jsonrpc": "2.0", "id": message["id"], "result": None})
            else:
                self.on_notification(message["method"], message.get("params"))
            return
        future = self._pending.pop(message["id"], None)
        if future is None or future.done():
            return
        if (error := message.get("error")) is not None:
            future.set_exception(ServerError(error["code"], error["message"]))
        else:
            future.set_result(message.get("result"))
