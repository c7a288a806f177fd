"""A real model server: llama.cpp's, with the default model, driven through `midfill serve`."""

import asyncio
import itertools
import json
import os
import socket
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import psutil
import pytest
import pytest_asyncio

from midfill.client import Client, ServerError
from midfill.engine.served.endpoint import RemoteSpec
from midfill.engine.served.remote import RemoteEngine
from midfill.errors import ModelError
from midfill.evaluation import infilling
from midfill.families import FAMILIES, Layout
from midfill.models import catalogue, fetch
from midfill.probing import HOLES, _prompt, _score

TASKS = Path(__file__).parents[3] / "shared" / "data" / "infilling" / "dev-tasks.jsonl.gz"
NUM_TASKS = 20
PROGRAM = Path(__file__).with_name("llama_server.py")
LONG = "def parse(text):\n    ▮\n" + "".join(f"value_{n} = {n}\n" for n in range(120))

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def gguf(model):
    pytest.importorskip("xllamacpp")
    try:
        return fetch.pull_gguf(catalogue.DEFAULT, lambda _message, _share: None)
    except ModelError as error:
        pytest.skip(f"needs the GGUF file of the default model: {error}")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@asynccontextmanager
async def running(gguf, port):
    """The server as a process; it is ended by its pid."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(PROGRAM), str(gguf), str(port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line.decode().strip() == f"http://127.0.0.1:{port}"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def serving(port, folder):
    """`midfill serve` with that engine in the user's own settings file."""
    config = folder / "config.toml"
    settings = {
        "engine": f"http://127.0.0.1:{port}",
        "eagerness": "always",
        "prefetch": False,
        "prefix_tokens": 96,
        "suffix_tokens": 32,
        "max_new_tokens": 16,
        "max_new_tokens_invoked": 16,
        "deadline_s": 60.0,
    }
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    client = await Client.start(env=os.environ | {"MIDFILL_CONFIG": str(config)})
    client.shown = []
    client.on_notification = lambda method, params: (
        client.shown.append(params["message"]) if method == "window/showMessage" else None
    )
    try:
        yield client
    finally:
        await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(gguf):
    """Where a server for all tests but the last one listens."""
    here = free_port()
    async with running(gguf, here):
        yield here


async def see(port, page):
    """What llama.cpp says of itself."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{port}/{page}", timeout=60)
        return answer.json() if page == "slots" else answer.text


async def until_processing(port, wanted, seconds):
    async with asyncio.timeout(seconds):
        for _ in itertools.count():
            if any(slot["is_processing"] for slot in await see(port, "slots")) is wanted:
                return
            await asyncio.sleep(0.02)


def open_at(client, marked, name):
    before, after = marked.split("▮")
    uri = f"file:///work/{name}"
    item = {"uri": uri, "languageId": "python", "version": 1, "text": before + after}
    client.notify("textDocument/didOpen", {"textDocument": item})
    position = {"line": before.count("\n"), "character": len(before) - before.rfind("\n") - 1}
    return {"textDocument": {"uri": uri}, "position": position, "context": {"triggerKind": 1}}


async def ghost(client, marked, name):
    params = open_at(client, marked, name)
    items = (await client.request("textDocument/inlineCompletion", params))["items"]
    why = await client.request("midfill/explain", params)
    return (items[0]["insertText"] if items else ""), why


async def until_loaded(client):
    async with asyncio.timeout(60):
        for n in itertools.count():
            _, why = await ghost(client, "x = 1\ny = ▮\n", f"warm{n}.py")
            if why["reason"] not in {"loading", "model-failed"}:
                return
            await asyncio.sleep(0.1)


async def test_infilling_tasks_get_suggestions(port, tmp_path):
    if not TASKS.exists():
        pytest.skip(f"the infilling tasks of ../shared are not here: {TASKS}")
    tasks = [task for task in infilling.read_tasks(TASKS) if task.id.startswith("SingleLine")][:NUM_TASKS]
    async with serving(port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        found = [
            await ghost(client, f"{task.before}▮{task.after}", f"task{at}.py")
            for at, task in enumerate(tasks)
        ]
        texts = [text for text, _ in found]
        assert sum(map(bool, texts)) >= NUM_TASKS - 2, found
        assert sum(text.strip() == task.truth.strip() for text, task in zip(texts, tasks, strict=True)) >= 6
        assert not [text for text in texts if "<|" in text]
        # The vocabulary was compared, so the prompts were ids; and nothing for models is loaded.
        libraries = {Path(region.path).name for region in psutil.Process(client.process.pid).memory_maps()}
        assert not [name for name in libraries if "torch" in name or "openvino" in name]
        assert client.shown == []


async def test_a_half_typed_word_is_healed_and_the_next_key_is_cheap(port, tmp_path):
    async with serving(port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        text, _ = await ghost(client, "import json\n\n\ndef read(text):\n    return json.lo▮\n", "heal.py")
        assert text == "ads(text)"
        params = open_at(client, LONG.replace("    ▮", "    value = te▮"), "reuse.py")
        await client.request("textDocument/inlineCompletion", params)
        before = counted(await see(port, "metrics"), "prompt_tokens_total")
        change = {
            "range": {"start": params["position"], "end": params["position"]},
            "text": "s",
        }
        document = params["textDocument"] | {"version": 2}
        client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
        position = params["position"] | {"character": params["position"]["character"] + 1}
        await client.request("textDocument/inlineCompletion", params | {"position": position})
        assert counted(await see(port, "metrics"), "prompt_tokens_total") - before <= 8


def counted(metrics, name):
    (line,) = [row for row in metrics.splitlines() if row.startswith(f"llamacpp:{name}")]
    return int(line.split()[1])


async def test_a_cancelled_request_stops_there(port, tmp_path):
    async with serving(port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        await until_processing(port, wanted=False, seconds=20)
        before = counted(await see(port, "metrics"), "tokens_predicted_total")
        id_, future = client.send_request("textDocument/inlineCompletion", open_at(client, LONG, "cancel.py"))
        await until_processing(port, wanted=True, seconds=20)
        client.cancel(id_)
        with pytest.raises(ServerError) as error:
            await future
        assert error.value.code == -32800
        # A quarter of a second for who changes their mind, then the batch of 32 tokens under way.
        await until_processing(port, wanted=False, seconds=30)
        # Not one that ran to its end: it might write 16 tokens.
        assert counted(await see(port, "metrics"), "tokens_predicted_total") - before < 10


async def test_the_model_is_asked_as_one_here_is(port):
    """The probe of a family, on one of its holes: the text behind the hole makes the middle likelier."""
    engine = RemoteEngine(RemoteSpec((f"http://127.0.0.1:{port}",), first_token_s=60))
    await engine.start(lambda _message, _share: None)
    tokenizer, family = engine.model.tokenizer, FAMILIES["qwen2.5-coder"]
    psm, alone = [
        await _score(engine, _prompt(tokenizer, family, layout, HOLES[0]), HOLES[0][1])
        for layout in (Layout.PSM, None)
    ]
    assert psm > alone + 0.3
    await engine.close()


async def test_killed_in_the_middle_and_back_again(gguf, tmp_path):
    port = free_port()
    async with serving(port, tmp_path) as client:
        async with running(gguf, port) as process:
            await client.initialize({})
            await until_loaded(client)
            params = open_at(client, LONG, "killed.py")
            _, future = client.send_request("textDocument/inlineCompletion", params)
            await until_processing(port, wanted=True, seconds=20)
            process.kill()
            assert (await future)["items"] == []
            assert (await client.request("midfill/explain", params))["reason"] == "engine-unavailable"
            for n in range(6):
                assert (await ghost(client, LONG, f"gone{n}.py"))[1]["reason"] == "engine-unavailable"
        away = f"midfill: 127.0.0.1:{port} cannot be reached."
        assert client.shown.count(away) == 1
        assert len(client.shown) <= 2
        async with running(gguf, port), asyncio.timeout(60):
            for n in itertools.count():
                text, _ = await ghost(client, "def add(a, b):\n    return a ▮\n", f"back{n}.py")
                if text:
                    break
                await asyncio.sleep(0.2)
        assert len(client.shown) <= 2
