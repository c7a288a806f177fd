import json

import pytest
from midfill.client import SERVE_COMMAND, Client
from raw import Raw


@pytest.fixture
def script(tmp_path):
    """Write an engine script; gives the arguments that make the server use it."""

    def write(*rules, **options):
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": list(rules)} | options))
        return ["--engine", f"scripted:{path}"]

    return write


@pytest.fixture
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


@pytest.fixture
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
