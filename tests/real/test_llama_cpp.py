"""A real model server: llama.cpp's, with the default model, driven through `midfill serve`."""

import asyncio
import sys
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from through_serve import (
    LONG,
    cancel_one,
    fill_in_tasks,
    free_port,
    ghost,
    lose,
    open_at,
    see,
    serving,
    until_back,
    until_loaded,
)

from midfill.engine.remote.client.endpoint import RemoteSpec
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.errors import ModelError
from midfill.fim.probing import HOLES, _prompt, _score
from midfill.fim.templates import FAMILIES, Layout
from midfill.models import catalogue, fetch

PROGRAM = Path(__file__).with_name("llama_server.py")

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def gguf(model):
    pytest.importorskip("xllamacpp")
    try:
        return fetch.pull_gguf(catalogue.DEFAULT, lambda _message, _share: None)
    except ModelError as error:
        pytest.skip(f"needs the GGUF file of the default model: {error}")


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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(gguf):
    """Where a server for all tests but the last one listens."""
    here = free_port()
    async with running(gguf, here):
        yield here


async def computes(port):
    return any(slot["is_processing"] for slot in await see(port, "slots"))


async def counted(port, name):
    (line,) = [row for row in (await see(port, "metrics")).splitlines() if row.startswith(f"llamacpp:{name}")]
    return int(line.split()[1])


async def test_infilling_tasks_get_suggestions(port, tmp_path):
    async with serving(port, tmp_path) as client:
        # What is right does not depend on how busy the machine is.
        await client.initialize({"deadline_s": 60})
        await until_loaded(client)
        await fill_in_tasks(client)


async def test_a_half_typed_word_is_healed_and_the_next_key_is_cheap(port, tmp_path):
    async with serving(port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        text, _ = await ghost(client, "import json\n\n\ndef read(text):\n    return json.lo▮\n", "heal.py")
        assert text == "ads(text)"
        params = open_at(client, LONG.replace("    ▮", "    value = te▮"), "reuse.py")
        await client.request("textDocument/inlineCompletion", params)
        before = await counted(port, "prompt_tokens_total")
        change = {
            "range": {"start": params["position"], "end": params["position"]},
            "text": "s",
        }
        document = params["textDocument"] | {"version": 2}
        client.notify("textDocument/didChange", {"textDocument": document, "contentChanges": [change]})
        position = params["position"] | {"character": params["position"]["character"] + 1}
        await client.request("textDocument/inlineCompletion", params | {"position": position})
        assert await counted(port, "prompt_tokens_total") - before <= 8


async def test_a_cancelled_request_stops_there(port, tmp_path):
    async with serving(port, tmp_path) as client:
        await client.initialize({})
        await until_loaded(client)
        await cancel_one(client, partial(computes, port), partial(counted, port, "tokens_predicted_total"))


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
            await lose(client, partial(computes, port), process.kill)
        async with running(gguf, port):
            await until_back(client, port)
