"""Adapters on served engines: found by digest or by name, loaded where that is allowed, lost and found."""

import json
from dataclasses import replace

import httpx2
import pytest
from faulty import GOOD, Faulty, page
from serving import RULES, TOKEN, hosted
from test_engine_server import request

from midfill.engine.api import BASE, AdapterSource, Request
from midfill.engine.remote.client.endpoint import RemoteSpec
from midfill.engine.remote.client.fallback import FallbackEngine
from midfill.engine.remote.client.remote import RemoteEngine
from midfill.engine.remote.server.listen import ListenSpec
from midfill.engine.scripted import Rule, Script, ScriptedEngine
from midfill.errors import AdapterError

NAME = "Qwen/Qwen2.5-Coder-0.5B"


@pytest.fixture
def ours(tmp_path):
    return AdapterSource("ab" * 32, "ours", tmp_path)


class Vllm(Faulty):
    """What vLLM 0.32 answers: adapters are rows beside their base, without a context of their own."""

    def __init__(self, adapters=(), *, may_load=False):
        super().__init__()
        self.names = list(adapters)
        self.rows()
        if may_load:
            self.pages["/v1/load_lora_adapter"] = self.load

    def rows(self):
        base = {"id": NAME, "owned_by": "vllm", "parent": None, "max_model_len": 900}
        rows = [base | {"id": n, "parent": p, "max_model_len": None} for n, p in self.names]
        self.models = {"object": "list", "data": [base, *rows]}

    def load(self, body):
        self.names.append((body["lora_name"], NAME))
        self.rows()
        return "Success"

    def asked_for(self):
        return [body["model"] for body in self.completions]


async def engine_at(server, **spec):
    engine = RemoteEngine(RemoteSpec((server.url,), first_token_s=1, **spec))
    await engine.start(lambda _message, _share: None)
    return engine


async def write(engine, adapter=None):
    return "".join([token.text async for token in engine.generate(Request((1,), 8, adapter=adapter))])


async def test_an_adapter_as_the_model_has_the_context_and_family_of_its_base():
    async with Vllm([("ours", NAME)]) as server:
        engine = await engine_at(server, model="ours")
        model = engine.model
        assert (model.context, model.family, model.adapter) == (900, "qwen2.5-coder", "ours")
        await write(engine)
        await write(engine, BASE)
        assert server.asked_for() == ["ours", NAME]
        await engine.close()


async def test_an_adapter_is_loaded_where_vllm_allows_that(ours):
    async with Vllm(may_load=True) as server:
        engine = await engine_at(server)
        await engine.set_adapters([ours])
        await engine.set_adapters([ours])
        loads = [body for path, _, body in server.asked if path == "/v1/load_lora_adapter"]
        assert loads == [{"lora_name": "midfill-" + "ab" * 8, "lora_path": str(ours.path)}]
        await write(engine, ours.key)
        await write(engine)
        assert server.asked_for() == ["midfill-" + "ab" * 8, NAME]
        await engine.set_adapters([])
        await write(engine, ours.key)
        assert server.asked_for()[-1] == NAME
        await engine.close()


async def test_else_a_name_is_enough_if_it_is_of_this_model(ours):
    async with Vllm([("ours", NAME), ("other", "another")]) as server:
        engine = await engine_at(server)
        await engine.set_adapters([ours])
        await write(engine, ours.key)
        assert server.asked_for() == ["ours"]
        for name in ("other", "absent", NAME):
            with pytest.raises(AdapterError, match=f"does not have the adapter {name} .*--enable-lora"):
                await engine.set_adapters([replace(ours, key="cd" * 32, name=name)])
        await write(engine, ours.key)
        assert server.asked_for() == ["ours"] * 2, "what was there stays"
        await engine.close()


async def test_a_server_that_comes_back_without_its_adapters_gets_them_again(ours):
    async with Vllm(may_load=True) as server:
        engine = await engine_at(server)
        await engine.set_adapters([ours])
        server.script = [page("500 Internal Server Error")]
        with pytest.raises(Exception, match="failed with status 500"):
            await write(engine, ours.key)
        server.script, server.names = GOOD, []
        server.rows()
        assert await write(engine, ours.key) == "a + b"
        assert server.asked_for()[-1] == "midfill-" + "ab" * 8
        # And one that may not have it any more still answers.
        server.script = [page("500 Internal Server Error")]
        with pytest.raises(Exception, match="failed with status 500"):
            await write(engine, ours.key)
        server.script, server.names = GOOD, []
        server.rows()
        del server.pages["/v1/load_lora_adapter"]
        assert await write(engine, ours.key) == "a + b"
        assert server.asked_for()[-1] == NAME
        await engine.close()


async def test_a_team_names_adapters_as_models(ours, monkeypatch):
    monkeypatch.setenv("ADAS", TOKEN)
    rules = [Rule(adapter="ours", text="with"), *RULES]
    listen = ListenSpec(tokens={TOKEN: "ada"})
    async with hosted(listen, rules=rules, adapters=(ours,)) as (host, address):
        for name, spec in (("ours", {"model": "ours"}), ("scripted", {})):
            engine = RemoteEngine(RemoteSpec((address,), key="env:ADAS", **spec))
            await engine.start(lambda _message, _share: None)
            (endpoint,) = engine.endpoints
            assert endpoint.served.models == ("scripted", "ours")
            assert endpoint.served.model == name
            written = [token.text async for token in engine.generate(request(engine, "x"))]
            assert "".join(written) == ("with" if name == "ours" else "hello")
            if name == "scripted":
                await engine.set_adapters([ours])
                written = [t.text async for t in engine.generate(request(engine, "x", adapter=ours.key))]
                assert "".join(written) == "with"
                with pytest.raises(AdapterError, match="--with-adapter ours"):
                    await engine.set_adapters([replace(ours, key="cd" * 32)])
            await engine.close()
        async with httpx2.AsyncClient(base_url=address) as client:
            body, headers = {"model": "theirs", "prompt": "x"}, {"Authorization": f"Bearer {TOKEN}"}
            answer = await client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 404
        assert "scripted, ours" in json.loads(answer.text)["error"]["message"]
        assert host.known_adapters == [ours]


async def test_the_model_in_reserve_has_the_adapters_too(ours):
    here = ScriptedEngine(Script(rules=[Rule(adapter="ours", text="with"), Rule(text="without")]))
    async with Faulty() as server:
        pass
    engine = FallbackEngine(RemoteEngine(RemoteSpec((server.url,))), lambda: here)
    await engine.start(lambda _message, _share: None)
    await engine.set_adapters([ours])
    assert [await write(engine), await write(engine, ours.key)] == ["without", "with"]
    await engine.close()
