"""A server process driven byte by byte, for what a well-behaved client would never send."""

import asyncio
import json
import os
import sys

COMMAND = [sys.executable, "-P", "-m", "midfill", "serve"]
TIMEOUT_S = 10


def frame(message, **headers):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    lines = [f"Content-Length: {len(body)}"] + [f"{name.replace('_', '-')}: {v}" for name, v in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Raw:
    """Use `async with await Raw.start(...)`; the process is dead afterwards."""

    def __init__(self, process):
        self.process = process
        self.seen = []

    @classmethod
    async def start(cls, *arguments, env=None, cwd=None, command=None):
        process = await asyncio.create_subprocess_exec(
            *(command or COMMAND),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | (env or {}),
            cwd=cwd,
            limit=1 << 26,
        )
        return cls(process)

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

    async def serves(self):
        """It still answers a request."""
        self.request("alive?", "midfill/explain", {"textDocument": {"uri": "file:///alive.py"}})
        while (await self.receive()).get("id") != "alive?":
            pass

    async def status(self):
        """Exit status, within five seconds."""
        async with asyncio.timeout(5):
            return await self.process.wait()
