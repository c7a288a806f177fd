"""A model server that goes wrong in one given way: raw bytes over a real socket on the loopback."""

import asyncio
import contextlib
import json
import socket
import struct
from urllib.parse import urlsplit

MODELS = {"object": "list", "data": [{"id": "qwen2.5-coder-0.5b", "max_model_len": 2000}]}
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
WORDS = ("a", " +", " b")


def chunk(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(value):
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def word(text, logprob=-0.1, finish=None):
    logprobs = {"tokens": [text], "token_logprobs": [logprob]}
    return event({"choices": [{"text": text, "logprobs": logprobs, "finish_reason": finish}]})


GOOD = [
    STREAM,
    *(chunk(word(text)) for text in WORDS),
    chunk(word("", finish="stop")),
    chunk(event(b"[DONE]")),
    b"0\r\n\r\n",
]


def page(status, body=b"{}", kind="application/json", **headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def tokenize(tokenizer, field):
    """A server's `/tokenize` that has this vocabulary, sentinels included."""
    marks = {tokenizer.decode([token]): token for token in tokenizer.control_ids}

    def page_(body):
        text, ids = body[field], []
        while text:
            mark = next((mark for mark in marks if text.startswith(mark)), None)
            if mark is not None:
                ids.append(marks[mark])
                text = text[len(mark) :]
            else:
                end = min((at for mark in marks if (at := text.find(mark)) > 0), default=len(text))
                ids += tokenizer.encode(text[:end])
                text = text[end:]
        return {"tokens": ids}

    return page_


def listing(owner, name="Qwen/Qwen2.5-Coder-0.5B", **more):
    return {"object": "list", "data": [{"id": name, "owned_by": owner} | more]}


RESET, SILENCE = "reset", "silence"
_COMPLETIONS = ("/completions", "/completion", "/generate")


class Faulty:
    """`async with Faulty() as server`; `server.script` is what a completion is answered with.

    A script is a list of bytes to send, floats to wait (seconds), `RESET` (drop the connection hard),
    `SILENCE` (say nothing until the other side hangs up), or functions that give an endless iterator; or it
    is a function from the body of the request to such a list. At its end the connection is closed.
    """

    def __init__(self, models=MODELS, script=GOOD):
        self.models = models
        self.script = script
        self.asked = []  # (path, headers, body)
        self.hung_up = asyncio.Event()
        self.was_asked = asyncio.Event()
        self.pages = {}

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", getattr(self, "port", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._open = set()
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    @property
    def completions(self):
        return [body for path, _, body in self.asked if path.endswith(_COMPLETIONS)]

    async def _serve(self, reader, writer):
        self._open.add(writer)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._answer(reader, writer):
                    pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        request, *lines = head.strip().split("\r\n")
        headers = {line.split(":")[0].lower(): line.split(":", 1)[1].strip() for line in lines}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        # A proxy is asked for whole URLs.
        path = urlsplit(request.split()[1]).path
        self.asked.append((path, headers, json.loads(body) if body else None))
        if path.endswith(_COMPLETIONS):
            self.was_asked.set()
        if path == "/v1/models" and self.models is not None:
            writer.write(page(200, json.dumps(self.models).encode()))
            await writer.drain()
            return True
        if path in self.pages:
            writer.write(page(200, json.dumps(self.pages[path](self.asked[-1][2])).encode()))
            await writer.drain()
            return True
        if not path.endswith(_COMPLETIONS):
            writer.write(page(404))
            await writer.drain()
            return True
        script = self.script(self.asked[-1][2]) if callable(self.script) else self.script
        whole = script is GOOD
        watch = asyncio.create_task(reader.read(1)) if not whole else None
        try:
            for step in script:
                await self._play(step, writer, watch)
        finally:
            if watch is not None:
                watch.cancel()
        return whole

    async def _play(self, step, writer, watch):
        if isinstance(step, bytes):
            writer.write(step)
            await writer.drain()
        elif isinstance(step, float):
            await asyncio.wait([watch], timeout=step)
        elif step == RESET:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif step == SILENCE:
            await asyncio.wait([watch])
            self.hung_up.set()
        else:
            for data in step():
                if watch.done():
                    self.hung_up.set()
                    return
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(0.001)
