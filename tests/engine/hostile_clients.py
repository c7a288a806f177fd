"""One hostile client of a team's engine, in a process of its own: `hostile_clients.py KIND ADDRESS TOKEN`.

It says a line when it has begun, and goes on until its stdin ends. Each kind is a function here.
"""

import asyncio
import contextlib
import itertools
import json
import sys
import threading
from urllib.parse import urlsplit


class Victim:
    """The server, as its enemy sees it."""

    def __init__(self, url, token):
        self.host, self.port = urlsplit(url).hostname, urlsplit(url).port
        self.who = f"Host: localhost\r\nAuthorization: Bearer {token}\r\n".encode()

    async def connect(self, data=b""):
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=1000)
        writer.write(data)
        return reader, writer

    def request(self, body, path=b"/v1/completions"):
        data = json.dumps(body).encode()
        head = b"POST " + path + b" HTTP/1.1\r\n" + self.who
        return head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data

    def page(self, path):
        return b"GET " + path + b" HTTP/1.1\r\n" + self.who + b"\r\n"

    async def read_all(self, reader):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass

    async def again_and_again(self, data, *, hold_s=None):
        """Send it on a connection, read what comes until the server hangs up, or hold it, for ever."""
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await self.connect(data)
                if hold_s is None:
                    await self.read_all(reader)
                else:
                    await asyncio.sleep(hold_s)
                writer.close()
            await asyncio.sleep(0.01)


async def many(number, make):
    await asyncio.gather(*(make(n) for n in range(number)))


async def many_stops(victim):
    """Long stops, that the model's own text nearly begins with; as many as are taken, and far too many."""
    few = {"max_tokens": 3000, "stream": True, "stop": ["w * h\nreturn\nwidth = 1\n" * 4 + "!"] * 8}
    lots = {"max_tokens": 3000, "stop": ["w * h" * 380] * 900}
    bodies = [{"prompt": "a" * 20} | few, {"prompt": "b" * 20} | lots]
    await many(8, lambda n: victim.again_and_again(victim.request(bodies[n % 2])))


async def slow_head(victim):
    await many(300, lambda _: victim.again_and_again(b"GET /health HTTP/1.1\r\nHo", hold_s=3600))


async def slow_body(victim):
    half = victim.request({"prompt": "a"})[:-3]
    await many(60, lambda _: victim.again_and_again(half, hold_s=3600))


async def slow_reader(victim):
    body = {"prompt": "x" * 30, "max_tokens": 3000, "stream": True, "logprobs": 1}
    await many(16, lambda _: victim.again_and_again(victim.request(body), hold_s=3600))


async def huge_prompts(victim):
    data = victim.request({"prompt": "def add(a, b): " * 60_000, "max_tokens": 1})
    await many(8, lambda _: victim.again_and_again(data))


async def huge_lists(victim):
    data = victim.request({"prompt": [97] * 400_000, "max_tokens": 1})
    await many(8, lambda _: victim.again_and_again(data))


async def many_connections(victim):
    await many(500, lambda _: victim.again_and_again(victim.page(b"/health"), hold_s=3600))


async def flood_of_requests(victim):
    one = victim.request({"prompt": "z" * 50, "max_tokens": 1})

    async def flood(_):
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await victim.connect()
                reading = asyncio.ensure_future(victim.read_all(reader))
                while not reading.done():
                    writer.write(one)
                    await writer.drain()
                    await asyncio.sleep(0.005)
                writer.close()

    await many(16, flood)


async def flood_without_a_token(victim):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    await many(32, lambda _: victim.again_and_again(one))


async def ready_streams(victim):
    await many(100, lambda _: victim.again_and_again(victim.page(b"/midfill/ready"), hold_s=3600))


async def cancel_storm(victim):
    count = itertools.count()

    async def cancel(_):
        while True:
            with contextlib.suppress(OSError):
                body = {"prompt": f"{next(count)} " + "q" * 1000, "max_tokens": 3000, "stream": True}
                reader, writer = await victim.connect(victim.request(body))
                await reader.read(1)
                writer.transport.abort()
            await asyncio.sleep(0.01)

    await many(16, cancel)


async def long_requests(victim):
    count = itertools.count()

    def body():
        return {"prompt": f"{next(count)}" + "p" * 500, "max_tokens": 3500, "stream": True}

    await many(16, lambda _: victim.again_and_again(victim.request(body())))


KINDS = (
    many_stops,
    slow_head,
    slow_body,
    slow_reader,
    huge_prompts,
    huge_lists,
    many_connections,
    flood_of_requests,
    flood_without_a_token,
    ready_streams,
    cancel_storm,
    long_requests,
)


async def main(kind, url, token):
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future({one.__name__: one for one in KINDS}[kind](Victim(url, token)))
    threading.Thread(
        target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(work.cancel)), daemon=True
    ).start()
    loop.call_later(0.5, lambda: print("begun", flush=True))
    with contextlib.suppress(asyncio.CancelledError):
        await work


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
