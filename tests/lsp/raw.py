"""A server process driven byte by byte, for what a well-behaved client would never send."""

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
from pathlib import Path

import psutil

import forkserver
from midfill.lsp.client import SERVE_COMMAND

COMMAND = list(SERVE_COMMAND)
# Only what hangs takes so long, on the slowest machine too.
TIMEOUT_S = 60


def frame(message, **headers):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    lines = [f"Content-Length: {len(body)}"] + [
        f"{name.replace('_', '-')}: {v}" for name, v in headers.items()
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def descendants(pid):
    """The processes under one, with their command lines.

    Without those that have ended, and those not yet themselves: they show as their parent.
    """
    found = {}
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line, parent = child.cmdline(), child.parent()
            if line and parent and line != parent.cmdline():
                found[child] = line
    return found


class Raw:
    """Use `async with await Raw.start(...)`; the process is dead afterwards."""

    def __init__(self, process, *, forked=False):
        self.process = process
        self.seen = []
        self._forked = forked

    @classmethod
    async def start(cls, *arguments, env=None, cwd=None, command=None):
        """Start a server: a forked one, if no other command is given (`tests/forkserver.py`)."""
        command = tuple(command or forkserver.command("serve"))
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | (env or {}),
            cwd=cwd,
            limit=1 << 26,
        )
        return cls(process, forked=command == forkserver.command("serve") != SERVE_COMMAND)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        if self.process.returncode is None:
            self.process.kill()
        for stream in (self.process.stdin,):
            stream.close()
        await self.process.communicate()

    def send(self, message, **headers):
        self.process.stdin.write(frame(message, **headers))

    def send_bytes(self, data):
        self.process.stdin.write(data)

    def request(self, id_, method, params=None):
        self.send({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})

    def notify(self, method, params=None):
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    async def receive(self):
        """The next message of any kind."""
        async with asyncio.timeout(TIMEOUT_S):
            header = await self.process.stdout.readuntil(b"\r\n\r\n")
            length = int(header.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            message = json.loads(await self.process.stdout.readexactly(length))
        self.seen.append(message)
        return message

    async def answer(self, id_):
        """The next answer, which must be to `id_`; requests and notifications are passed over."""
        while True:
            message = await self.receive()
            if "method" not in message:
                assert message["id"] == id_, message
                assert type(message["id"]) is type(id_)
                return message

    async def initialize(self, **params):
        self.request("init", "initialize", {"processId": None, "rootUri": None, "capabilities": {}} | params)
        answer = await self.answer("init")
        self.notify("initialized", {})
        return answer["result"]

    async def loaded(self):
        """The scripted model has been loaded: it has answered, by the rule that `script` always adds."""
        uri = "file:///warm.py"
        item = {"uri": uri, "languageId": "python", "version": 1, "text": "warm"}
        self.notify("textDocument/didOpen", {"textDocument": item})
        here = {"textDocument": {"uri": uri}, "position": {"line": 0, "character": 4}}
        async with asyncio.timeout(TIMEOUT_S):
            reason = "loading"
            while reason == "loading":
                self.request("warm", "textDocument/inlineCompletion", here | {"context": {"triggerKind": 1}})
                await self.answer("warm")
                self.request("why", "midfill/explain", {"textDocument": {"uri": uri}})
                reason = (await self.answer("why"))["result"]["reason"]

    async def rest(self):
        """Everything up to the end of the stream."""
        messages = []
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                messages.append(await self.receive())
        return messages

    @property
    def pid(self):
        """The server's process id."""
        assert not self._forked, "mark the test with `process`: a forked server is another process"
        return self.process.pid

    def memory(self):
        """Bytes of memory in use (resident set)."""
        return psutil.Process(self.pid).memory_info().rss

    def peak_memory(self):
        """The most bytes of memory that it has ever had."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])

    def loop_s(self):
        """Seconds that the event loop's thread has computed: what else runs on the machine is not in it."""
        pid = self.pid
        return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9

    def close_output(self):
        """Close our end of the server's stdout, as an editor that crashed in part does."""
        self.process._transport.get_pipe_transport(1).close()

    async def serves(self):
        """It still answers a request."""
        self.request("alive?", "midfill/explain", {"textDocument": {"uri": "file:///alive.py"}})
        while (await self.receive()).get("id") != "alive?":
            pass

    async def status(self):
        """Exit status; an error if the process does not end."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.process.wait()


class Blocking:
    """The same, without an event loop: for hypothesis, whose examples are plain calls."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._ids = itertools.count()

    def send(self, message):
        self.process.stdin.write(frame(message))

    def notify(self, method, params):
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def request(self, method, params, passed_over=None):
        """The result of a request; what comes before it is added to `passed_over`."""
        id_ = next(self._ids)
        self.send({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})
        self.process.stdin.flush()
        while (message := self._read()).get("id") != id_ or "method" in message:
            if passed_over is not None:
                passed_over.append(message)
        return message["result"]

    def _read(self):
        length = int(self.process.stdout.readline().split(b":")[1])
        self.process.stdout.readline()
        return json.loads(self.process.stdout.read(length))

    def close(self):
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
