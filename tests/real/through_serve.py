"""What tests of real model servers have in common: each is the engine of `midfill serve`."""

import asyncio
import itertools
import json
import os
import socket
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from midfill.evaluation import infilling_tasks
from midfill.lsp.client import Client, ServerError

TASKS = Path(__file__).parents[3] / "shared" / "data" / "infilling" / "dev-tasks.jsonl.gz"
NUM_TASKS = 20
LONG = "def parse(text):\n    ▮\n" + "".join(f"value_{n} = {n}\n" for n in range(120))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


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


async def see(port, page):
    """What a server says of itself."""
    async with httpx2.AsyncClient(trust_env=False) as client:
        answer = await client.get(f"http://127.0.0.1:{port}/{page}", timeout=60)
        return answer.json() if page in {"slots", "v1/models"} else answer.text


async def until_computing(computes, wanted, seconds):
    """Wait until the server computes something, or nothing any more; it can only be asked."""
    async with asyncio.timeout(seconds):
        for _ in itertools.count():
            if await computes() is wanted:
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


async def fill_in_tasks(client):
    """The infilling tasks, on a server that sends token ids and has no library for models itself."""
    if not TASKS.exists():
        pytest.skip(f"the infilling tasks of ../shared are not here: {TASKS}")
    tasks = [task for task in infilling_tasks.read_tasks(TASKS) if task.id.startswith("SingleLine")][
        :NUM_TASKS
    ]
    found = [
        await ghost(client, f"{task.before}▮{task.after}", f"task{at}.py") for at, task in enumerate(tasks)
    ]
    texts = [text for text, _ in found]
    right = sum(text.strip() == task.truth.strip() for text, task in zip(texts, tasks, strict=True))
    print(f"{sum(map(bool, texts))} of {NUM_TASKS} tasks have a suggestion, {right} the very line")
    assert sum(map(bool, texts)) >= NUM_TASKS - 2, found
    assert right >= 6
    assert not [text for text in texts if "<|" in text]
    libraries = {Path(region.path).name for region in psutil.Process(client.process.pid).memory_maps()}
    assert not [name for name in libraries if "torch" in name or "openvino" in name]
    assert client.shown == []


async def cancel_one(client, computes, count):
    """A request that is taken back stops on their side; `count` tells how many tokens they have written."""
    await until_computing(computes, wanted=False, seconds=20)
    before = await count()
    id_, future = client.send_request("textDocument/inlineCompletion", open_at(client, LONG, "cancel.py"))
    await until_computing(computes, wanted=True, seconds=20)
    client.cancel(id_)
    with pytest.raises(ServerError) as error:
        await future
    assert error.value.code == -32800
    # A quarter of a second for who changes their mind, then the pass under way.
    await until_computing(computes, wanted=False, seconds=30)
    # Not one that ran to its end: it might write 16 tokens.
    assert await count() - before < 10


async def lose(client, computes, kill):
    """The server is killed in the middle of an answer: one sentence, and nothing is shown."""
    params = open_at(client, LONG, "killed.py")
    _, future = client.send_request("textDocument/inlineCompletion", params)
    await until_computing(computes, wanted=True, seconds=20)
    kill()
    assert (await future)["items"] == []
    assert (await client.request("midfill/explain", params))["reason"] == "engine-unavailable"
    for n in range(6):
        assert (await ghost(client, LONG, f"gone{n}.py"))[1]["reason"] == "engine-unavailable"


async def until_back(client, port):
    """It gives suggestions again, and each thing that was in the way has been said once."""
    assert client.shown.count(f"midfill: 127.0.0.1:{port} cannot be reached.") == 1
    async with asyncio.timeout(60):
        for n in itertools.count():
            text, _ = await ghost(client, "def add(a, b):\n    return a ▮\n", f"back{n}.py")
            if text:
                break
            await asyncio.sleep(0.2)
    # It hung up, it was away, and, if it was asked so early, it was loading its model.
    assert len(client.shown) == len(set(client.shown)), client.shown
