import json

import pytest
import pytest_asyncio
from raw import COMMAND, Raw

import forkserver
from midfill.lsp.client import Client

WARM = {"after": "warm", "text": "!"}


@pytest.fixture
def script(tmp_path):
    """Write an engine script; gives the arguments that make the server use it."""

    def write(*rules, **options):
        path = tmp_path / "script.json"
        path.write_text(json.dumps({"rules": [WARM, *rules]} | options))
        return ["--engine", f"scripted:{path}"]

    return write


@pytest.fixture
def command(request):
    """What starts a server: a forked one, unless the test looks at the process itself."""
    return COMMAND if request.node.get_closest_marker("process") else forkserver.command("serve")


@pytest_asyncio.fixture(loop_scope="module")
async def scripted(script, command):
    """Start a raw server with a scripted engine: `await scripted(rule, ...)`."""
    servers = []

    async def start(*rules, initialize=True, arguments=(), **options):
        server = await Raw.start(*script(*rules, **options), *arguments, command=command)
        servers.append(server)
        if initialize:
            await server.initialize()
        return server

    yield start
    for server in servers:
        await server.__aexit__()


@pytest_asyncio.fixture(loop_scope="module")
async def client(script, command):
    """Start a scripted server behind the product's own client: `await client(rule, ...)`."""
    clients = []

    async def start(*rules, arguments=(), options=None, **script_options):
        it = await Client.start([*command, *script(*rules, **script_options), *arguments])
        clients.append(it)
        it.heard = []
        it.on_notification = lambda method, params: it.heard.append((method, params))
        await it.initialize(options)
        return it

    yield start
    for it in clients:
        await it.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shares(tmp_path_factory):
    """Give the module's server with these rules, to those of its tests that leave no trace in it.

    `await shares(rule, ...)` starts it at the first call. What the engine did is in `engine_log`.
    """
    servers = {}

    async def share(*rules):
        key = json.dumps(rules)
        if key not in servers:
            folder = tmp_path_factory.mktemp("shared")
            script = {"rules": [WARM, *rules], "log": str(folder / "log")}
            (folder / "script.json").write_text(json.dumps(script))
            server = servers[key] = await Raw.start(
                "--engine", f"scripted:{folder / 'script.json'}", command=COMMAND
            )
            server.engine_log = folder / "log"
            await server.initialize()
        return servers[key]

    yield share
    for server in servers.values():
        await server.__aexit__()


@pytest_asyncio.fixture(loop_scope="module")
async def shared(shares):
    """The module's server that suggests "1"."""
    return await shares({"text": "1"})
