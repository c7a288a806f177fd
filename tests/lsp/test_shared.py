"""`engine = "shared"`: the servers of all windows have one process with the model."""

import asyncio
import contextlib
import json
import signal as signals
import statistics
import sys
import time
import uuid
from pathlib import Path

import httpx2
import psutil
import pytest
import pytest_asyncio
import raw
from raw import COMMAND, Raw

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from tiny import as_gguf, write_model

from midfill.lsp.client import SERVE_COMMAND

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_SERVERS, NUM_DOCUMENTS = 10, 10


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with random weights, in a folder whose name says its family."""
    folder = tmp_path_factory.mktemp("models") / "tiny-granite-code"
    folder.mkdir()
    write_model("llama", folder)
    return folder


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """A request may wait for torch to be imported."""
    monkeypatch.setattr(raw, "TIMEOUT_S", 120)


class Place:
    """A user's settings and sockets; the shared engine there is ended by its pid."""

    def __init__(self, folder, model, **changes):
        self.runtime = folder / "run"
        self.runtime.mkdir(mode=0o700)
        settings = {
            "engine": "shared",
            "model": str(model),
            "dtype": "float32",
            "runner": "torch",
            "num_threads": 1,
            "eagerness": "always",
            "prefetch": False,
            "max_new_tokens": 8,
            "deadline_s": 100.0,
            **changes,
        }
        config = folder / "config.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
        self.env = {"MIDFILL_CONFIG": str(config), "MIDFILL_RUNTIME": str(self.runtime)}
        self.servers = []

    async def serve(self, command=None):
        server = await Raw.start("--log-level", "info", env=self.env, command=command)
        self.servers.append(server)
        await server.initialize()
        return server

    async def ask_engine(self, page="health"):
        (socket,) = self.runtime.glob("*.sock")
        transport = httpx2.AsyncHTTPTransport(uds=str(socket))
        async with httpx2.AsyncClient(transport=transport, base_url="http://midfill", timeout=60) as client:
            answer = await client.get(f"/{page}")
            return answer.json() if page == "health" else answer.text

    async def pid(self):
        return (await self.ask_engine())["pid"]

    async def close(self):
        for server in self.servers:
            await server.__aexit__()
        with contextlib.suppress(ValueError, httpx2.HTTPError, psutil.NoSuchProcess):
            process = psutil.Process(await self.pid())
            process.kill()
            process.wait(60)


@pytest_asyncio.fixture(loop_scope="module")
async def place(tmp_path, model):
    it = Place(tmp_path, model)
    yield it
    await it.close()


async def ask(server, text="def add(a, b):\n    return a"):
    """(milliseconds, reason) for a document of its own."""
    uri = f"file:///work/{uuid.uuid4().hex}.py"
    item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})
    last = text.split("\n")
    here = {"line": len(last) - 1, "character": len(last[-1])}
    begun = time.monotonic()
    params = {"textDocument": {"uri": uri}, "position": here, "context": {"triggerKind": 1}}
    id_ = uuid.uuid4().hex
    server.request(id_, "textDocument/inlineCompletion", params)
    await server.answer(id_)
    waited = time.monotonic() - begun
    server.request(id_ + "why", "midfill/explain", {"textDocument": {"uri": uri}})
    return waited * 1000, (await server.answer(id_ + "why"))["result"]


async def loaded(server):
    """Wait until the server's log says that it has its model."""
    async with asyncio.timeout(120):
        while b"serving" not in (line := await server.process.stderr.readline()):
            assert line, "it ended"


def asked_the_model(why):
    """Random weights write what they like; what counts is that they were asked."""
    return why["generatedTokens"] > 0 and why["reason"] not in {
        "engine-error",
        "engine-unavailable",
        "deadline",
    }


@pytest.mark.slow
async def test_ten_servers_have_one_model_and_none_disturbs_another(place):
    servers = [await place.serve(COMMAND) for _ in range(NUM_SERVERS)]
    await asyncio.gather(*map(loaded, servers))
    engines = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(place.runtime) in " ".join(process.info["cmdline"] or [])
    ]
    assert [process.pid for process in engines] == [await place.pid()]
    for server in servers:
        libraries = {Path(region.path).name for region in psutil.Process(server.pid).memory_maps()}
        assert not [name for name in libraries if "torch" in name or "openvino" in name]

    async def window(server):
        waits = []
        for n in range(NUM_DOCUMENTS):
            waited, why = await ask(server, f"def add_{n}(a, b):\n    return a")
            assert asked_the_model(why), why
            waits.append(waited)
        return statistics.mean(waits)

    means = await asyncio.gather(*map(window, servers))
    assert max(means) <= 2 * statistics.mean(means), means
    # One window dies in the middle of a request.
    servers[0].request("last", "textDocument/inlineCompletion", {})
    servers[0].process.kill()
    means = await asyncio.gather(*map(window, servers[1:]))
    assert max(means) <= 2 * statistics.mean(means), means
    assert 'midfill_requests_total{end="failed"}' not in await place.ask_engine("metrics")


@pytest.mark.slow
async def test_an_engine_that_dies_is_started_anew_by_the_next_request(place):
    servers = [await place.serve(), await place.serve()]
    await asyncio.gather(*map(loaded, servers))
    before = await place.pid()
    process = psutil.Process(before)
    process.kill()
    process.wait(60)
    # Nothing was under way: the next requests start it and are answered. Both ask; one starts.
    answers = await asyncio.gather(*map(ask, servers))
    assert all(asked_the_model(why) for _, why in answers), answers
    after = await place.pid()
    assert after != before
    # One that hangs and is ended, with a request under way of which nothing has come, is started anew for it.
    psutil.Process(after).suspend()
    waiting = asyncio.create_task(ask(servers[0], "def sub(a, b):\n    return a"))
    await asyncio.wait([waiting], timeout=0.3)
    psutil.Process(after).kill()
    _, why = await waiting
    assert asked_the_model(why), why
    answers = await asyncio.gather(*map(ask, servers))
    assert all(asked_the_model(why) for _, why in answers), answers
    assert await place.pid() not in {before, after}


async def test_llama_cpp_ends_its_own_process_and_not_the_editors_server(tmp_path):
    folder = tmp_path / "tiny-granite-code"
    file = as_gguf(write_model("llama", folder)).path
    place = Place(tmp_path, file, engine="local", runner="llamacpp")
    try:
        server = await place.serve()
        await loaded(server)
        for _ in range(2):
            _, why = await ask(server)
            assert asked_the_model(why), why
            engine = psutil.Process(await place.pid())
            assert engine.pid != server.process.pid
            assert not [region for region in _files(server.process.pid) if "xllamacpp" in region]
            assert [region for region in _files(engine.pid) if "xllamacpp" in region]
            # As ggml does on a failed assertion.
            engine.send_signal(signals.SIGABRT)
            engine.wait(60)
        _, why = await ask(server)
        assert asked_the_model(why), why
    finally:
        await place.close()


def _files(pid):
    return [region.path for region in psutil.Process(pid).memory_maps()]


@pytest.mark.parametrize("signal", ["SIGTERM", "SIGINT"])
async def test_an_engine_that_is_told_to_end_leaves_nothing(tmp_path, signal):
    socket, script = tmp_path / "s.sock", tmp_path / "script.json"
    script.write_text(json.dumps({"rules": [{"text": "1"}]}))
    program = [*SERVE_COMMAND[:-1], "engine", "serve", "--socket", socket, "--engine", f"scripted:{script}"]
    process = await asyncio.create_subprocess_exec(
        *program, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert (await process.stdout.readline()).decode() == f"unix:{socket}\n"
    assert socket.is_socket()
    process.send_signal(getattr(signals, signal))
    _, complaints = await asyncio.wait_for(process.communicate(), 60)
    assert (process.returncode, complaints.decode()) == (0, "")
    assert not socket.exists()


async def why_it_failed(server, limit_s):
    """Wait until the user is told that there will be no model; gives the sentence."""
    async with asyncio.timeout(limit_s):
        while (message := await server.receive()).get("method") != "window/showMessage":
            pass
    _, why = await ask(server)
    assert why["reason"] == "model-failed"
    return message["params"]["message"]


async def test_a_folder_that_others_can_enter_is_not_used(place):
    place.runtime.chmod(0o755)
    server = await place.serve()
    message = await why_it_failed(server, 60)
    assert "is not private to you" in message
    assert not list(place.runtime.glob("*.sock"))


def damage(place, model, folder):
    """A copy of the model with half of its weights, in the user's settings."""
    broken = folder / "tiny-granite-code"
    broken.mkdir()
    for path in model.iterdir():
        data = path.read_bytes()
        (broken / path.name).write_bytes(data[: len(data) // 2] if path.suffix == ".safetensors" else data)
    config = Path(place.env["MIDFILL_CONFIG"])
    config.write_text(config.read_text().replace(str(model), str(broken)))


@pytest.mark.slow
async def test_a_model_that_cannot_be_loaded_is_said_with_its_own_words(place, model, tmp_path):
    damage(place, model, tmp_path)
    server = await place.serve()
    message = await why_it_failed(server, 60)
    assert "safetensors" in message
