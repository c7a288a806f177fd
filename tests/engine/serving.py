"""An `EngineApp` over a real socket, in this process."""

import asyncio
import itertools
from contextlib import asynccontextmanager

from midfill.engine.remote.server.listen import ListenSpec, serve
from midfill.engine.remote.server.model_host import ModelHost
from midfill.engine.scripted import Rule, Script, ScriptedEngine

TOKEN = "0123456789abcdef-ada"
RULES = [
    Rule(after="slow", text="x" * 500, token_delay_s=0.01),
    Rule(after="long", text="x" * 500, token_delay_s=0.1),
    Rule(after="bad", text="12", error="out of memory", error_after=2),
    Rule(text="hello", logprob=-0.25),
]


@asynccontextmanager
async def hosted(listen, *, rules=RULES, log="", limits=None, make=None, script=None, **options):
    """A service; gives its host and address. It has ended afterwards."""
    # Its vocabulary is all of Unicode, of which a digest would take seconds.
    options = {"vocabulary": "characters"} | options
    script = script or Script(rules=list(rules), log=log)
    host = ModelHost(make or (lambda: ScriptedEngine(script)), **options)
    address = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(host, listen, address.set_result, limits=limits))
    await asyncio.wait([task, address], return_when="FIRST_COMPLETED")
    if task.done():
        await task
    try:
        yield host, await address
    finally:
        host.on_exit()
        await task


async def until(condition):
    async with asyncio.timeout(60):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0.002)


def team(**options):
    return ListenSpec(**({"tokens": {TOKEN: "ada", TOKEN + "2": "bob"}} | options))
