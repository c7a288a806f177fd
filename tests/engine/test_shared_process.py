"""The process that windows share: when it ends, or a connection to it does, no request is lost."""

import asyncio
import json
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace

import httpx2
import psutil
import pytest
from filelock import FileLock
from serving import hosted

from midfill.engine.api import AdapterSource, Request
from midfill.engine.remote.client.shared import SharedEngine, ShareSpec
from midfill.engine.remote.server.listen import ListenSpec
from midfill.engine.scripted import Rule
from midfill.errors import EngineUnavailableError
from midfill.models.store import LocalModel

RULES = [
    {"adapter": "ours", "text": "adapted"},
    {"text": "hello"},
]


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """A scripted engine in a process of its own, which has ended afterwards."""
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("MIDFILL_RUNTIME", str(runtime))
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"rules": RULES}))
    yield ShareSpec(LocalModel("scripted", tmp_path, None, "made here"), ("--engine", f"scripted:{script}"))
    for process in psutil.process_iter(["cmdline"]):
        if str(runtime) in " ".join(process.info["cmdline"] or []):
            with suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait(60)


@asynccontextmanager
async def window(spec):
    """One window's engine."""
    engine = SharedEngine(spec)
    try:
        await engine.start(lambda _message, _share: None)
        yield engine
    finally:
        await engine.close()


async def test_a_process_that_never_finishes_starting_it_is_an_error_of_the_engine(spec):
    async with window(spec) as engine:
        with FileLock(engine.socket.with_suffix(".lock")):
            other = SharedEngine(replace(spec, start_s=0.1))
            with pytest.raises(EngineUnavailableError, match=r"more than 0\.1 s\. End that process, or set"):
                await other.start(lambda _message, _share: None)
            await other.close()
        # The lock is free again.
        await other.start(lambda _message, _share: None)
        await other.close()


async def ask(engine, text="x = ", **options):
    request = Request(tuple(engine.model.tokenizer.encode(text)), 20, **options)
    async with aclosing(engine.generate(request)) as tokens:
        return "".join([token.text async for token in tokens])


async def pid_of(engine):
    transport = httpx2.AsyncHTTPTransport(uds=str(engine.socket))
    async with httpx2.AsyncClient(transport=transport, base_url="http://midfill", timeout=60) as client:
        return (await client.get("/health")).json()["pid"]


async def killed(engine):
    """End the process; gives its id."""
    pid = await pid_of(engine)
    process = psutil.Process(pid)
    process.kill()
    await asyncio.to_thread(process.wait, 30)
    return pid


async def test_a_dying_process_that_still_takes_connections_costs_no_request(spec):
    async with window(spec) as engine:
        assert await ask(engine) == "hello"
        before = await killed(engine)
        # As the kernel ends a killed process: first its connections, a moment later its listening socket.
        taken = []

        def hang_up(_reader, writer):
            taken.append(writer)
            writer.close()

        engine.socket.unlink()
        async with await asyncio.start_unix_server(hang_up, engine.socket):
            assert await ask(engine) == "hello"
            assert taken
            assert await pid_of(engine) != before


async def test_another_window_that_starts_the_process_again_costs_no_request_and_no_adapter(spec, tmp_path):
    async with window(spec) as first, window(spec) as second:
        await second.set_adapters([AdapterSource("0123", "ours", tmp_path)])
        assert await ask(second, adapter="0123") == "adapted"
        assert await ask(first) == "hello"
        await killed(first)
        assert await ask(first) == "hello"
        assert await ask(second, adapter="0123") == "adapted"


class Proxy:
    """Between an engine's client and its process: counts what is asked, and cuts connections.

    Attributes:
        asked: how many completions.
        cuts: the number of the one that is cut off before the process has it.
    """

    def __init__(self, behind, cuts=0):
        self._behind = behind
        self.asked = 0
        self.cuts = cuts
        self._writers = []

    async def serve(self, reader, writer):
        inner_reader, inner_writer = await asyncio.open_unix_connection(self._behind)
        self._writers += [writer, inner_writer]
        await asyncio.gather(self._pump(reader, inner_writer), self._pump(inner_reader, writer))

    async def _pump(self, reader, writer):
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if b"/v1/completions" in data:
                    self.asked += 1
                    if self.asked == self.cuts:
                        self.cut()
                        return
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self):
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def proxied(spec, folder, **options):
    """A window whose connections to a process can be cut, which lives on."""
    listen = ListenSpec(socket=folder / "s")
    rules = [Rule(after="long = ", text="abc", hang=True), Rule(text="hello")]
    async with hosted(listen, rules=rules):
        proxy = Proxy(listen.socket, **options)
        server = await asyncio.start_unix_server(proxy.serve, SharedEngine(spec).socket)
        try:
            async with window(spec) as engine:
                yield engine, proxy
        finally:
            server.close()
            proxy.cut()
            await server.wait_closed()


async def test_a_connection_that_ends_costs_no_request_that_was_not_begun(spec, tmp_path):
    async with proxied(spec, tmp_path, cuts=2) as (engine, proxy):
        assert await ask(engine) == "hello"
        assert await ask(engine) == "hello"
        assert proxy.asked == 3


async def test_an_answer_that_was_begun_breaks_off_with_its_connection_and_is_not_asked_for_again(
    spec, tmp_path
):
    async with proxied(spec, tmp_path) as (engine, proxy):
        request = Request(tuple(engine.model.tokenizer.encode("long = ")), 20)
        async with aclosing(engine.generate(request)) as tokens:
            assert (await anext(tokens)).text == "a"
            proxy.cut()
            with pytest.raises(EngineUnavailableError, match="closed the connection"):
                async for _ in tokens:
                    pass
        assert proxy.asked == 1
        assert await ask(engine) == "hello"
