import json

import pytest
import pytest_asyncio
from raw import Raw

from midfill.lsp.client import SERVE_COMMAND, Client

WARM = {"after": "warm", "text": "!"}


@pytest.fixture
def script(tmp_path):
    """Write an engine script; gives the arguments that make the server use it."""

    def write(*rules, **options):
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": [WARM, *rules]} | options))
        return ["--engine", f"scripted:{path}"]

    return write


@pytest_asyncio.fixture(loop_scope="module")
async def scripted(script):
    """Start a raw server with a scripted engine: `await scripted(rule, ...)`."""
    servers = []

    async def start(*rules, initialize=True, arguments=(), **options):
        server = await Raw.start(*script(*rules, **options), *arguments)
        servers.append(server)
        if initialize:
            await server.initialize()
        return server

    yield start
    for server in servers:
        await server.__aexit__()


@pytest_asyncio.fixture(loop_scope="module")
async def client(script):
    """Start a scripted server behind the product's own client: `await client(rule, ...)`."""
    clients = []

    async def start(*rules, arguments=(), options=None, **script_options):
        it = await Client.start([*SERVE_COMMAND, *script(*rules, **script_options), *arguments])
        clients.append(it)
        it.heard = []
        it.on_notification = lambda method, params: it.heard.append((method, params))
        await it.initialize(options)
        return it

    yield start
    for it in clients:
        await it.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory):
    """One server for all those tests of a module that leave no trace in it."""
    path = tmp_path_factory.mktemp("shared") / "script.json"
    path.write_text(json.dumps({"rules": [WARM, {"text": "1"}]}))
    async with await Raw.start("--engine", f"scripted:{path}") as server:
        await server.initialize()
        yield server
