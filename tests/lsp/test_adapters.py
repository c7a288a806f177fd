"""Adapters in the running server: which document gets which, and that no workspace decides it."""

import asyncio
import json

import pytest
from planted_adapters import write_adapter, write_base
from raw import Raw

from midfill.adapters.bindings import OFF, Bindings
from midfill.adapters.registry import Evaluation, Registry
from midfill.completion.stats.acceptance import is_held_out, key_of, read_sessions
from midfill.lsp.client import SERVE_COMMAND

pytestmark = pytest.mark.asyncio(loop_scope="module")

RULES = [{"adapter": "one", "text": "1"}, {"adapter": "two", "text": "2"}, {"text": "0"}]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folders, with a base model and two adapters; one more that was rejected."""
    monkeypatch.setenv("MIDFILL_DATA", str(tmp_path / "data"))
    base = write_base(tmp_path / "model")
    (base.path / "config.json").write_text('{"model_type": "llama"}')
    (base.path / "tokenizer.json").write_text("{}")
    for seed, name in enumerate(("one", "two", "bad")):
        folder = write_adapter(tmp_path / name, seed=seed)
        verdict = Evaluation("rejected", ("It was worse.",)) if name == "bad" else None
        Registry().add(folder, name=name, base=base, evaluation=verdict)
    (tmp_path / "project").mkdir()
    return tmp_path


@pytest.fixture
def start(home, scripted):
    async def start(**params):
        server = await scripted(*RULES, arguments=["--model", str(home / "model")], initialize=False)
        await server.initialize(rootUri=(home / "project").as_uri(), **params)
        await server.loaded()
        return server

    return start


def digest(name):
    return Registry().get(name).digest


def open_document(server, uri, language="python"):
    item = {"uri": uri, "languageId": language, "version": 1, "text": "a = \n"}
    server.notify("textDocument/didOpen", {"textDocument": item})


async def ask(server, uri):
    here = {"textDocument": {"uri": uri}, "position": {"line": 0, "character": 4}}
    answer = await request(server, "textDocument/inlineCompletion", here | {"context": {"triggerKind": 1}})
    return answer["result"]["items"]


async def request(server, method, params):
    server.request("ours", method, params)
    return await server.answer("ours")


async def answer(server, uri, language="python"):
    """What is suggested in a fresh document."""
    open_document(server, uri, language)
    [item] = await ask(server, uri)
    server.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    return item["insertText"]


async def settled(server, uri, expected, language="python"):
    """The answer becomes this one, since changes are noticed at edits, once a second."""
    async with asyncio.timeout(60):
        while (found := await answer(server, uri, language)) != expected:
            assert found in "012"


async def command(server, name, *arguments):
    result = await request(
        server, "workspace/executeCommand", {"command": name, "arguments": list(arguments)}
    )
    return result["result"]


async def test_each_document_gets_the_adapter_that_is_bound_for_it(home, start):
    Bindings().bind(digest("one"), workspace=home / "project")
    Bindings().bind(digest("two"), language="rust")
    server = await start()
    await settled(server, (home / "project" / "a.py").as_uri(), "1")
    await settled(server, (home / "elsewhere.rs").as_uri(), "2", "rust")
    assert await answer(server, (home / "elsewhere.py").as_uri()) == "0"
    status = (await request(server, "midfill/status", {}))["result"]
    assert status["adapter"] == "one, two"


async def test_a_change_on_the_command_line_counts_in_a_running_server(home, start):
    server = await start()
    uri = (home / "project" / "a.py").as_uri()
    assert await answer(server, uri) == "0"
    Bindings().bind(digest("one"))
    await settled(server, uri, "1")
    Bindings().bind(digest("two"), workspace=home / "project")
    await settled(server, uri, "2")
    Bindings().bind(OFF, workspace=home / "project")
    await settled(server, uri, "0")


async def test_one_may_be_chosen_while_the_model_is_loaded(home, scripted):
    server = await scripted(
        *RULES, arguments=["--model", str(home / "model")], initialize=False, load_delay_s=600
    )
    await server.initialize(rootUri=(home / "project").as_uri())
    assert await command(server, "midfill.adapter.use", "one") == {"running": None, "error": None}
    assert Bindings().read().uses(digest("one")) == [f"workspace {home / 'project'}"]
    assert await command(server, "midfill.adapter.off") == {"running": None, "error": None}
    assert Bindings().read().uses(digest("one")) == []
    assert not any(message.get("method") == "window/showMessage" for message in server.seen)


async def test_an_answer_of_one_adapter_is_not_given_for_another(home, start):
    """The document stays as it is, and what was remembered for it is forgotten."""
    server = await start()
    uri = (home / "project" / "a.py").as_uri()
    open_document(server, uri)
    for name, expected in (("one", "1"), ("two", "2"), (None, "0")):
        if name is None:
            await command(server, "midfill.adapter.off")
        else:
            assert await command(server, "midfill.adapter.use", name) == {"running": name, "error": None}
        [item] = await ask(server, uri)
        assert item["insertText"] == expected


async def test_bindings_without_an_adapter_take_no_suggestion_away(home, start):
    server = await start()
    uri = (home / "project" / "a.py").as_uri()
    open_document(server, uri)
    [before] = await ask(server, uri)
    assert await command(server, "midfill.adapter.off") == {"running": None, "error": None}
    [after] = await ask(server, uri)
    assert after["insertText"] == before["insertText"]
    explained = await request(server, "midfill/explain", {"textDocument": {"uri": uri}})
    assert explained["result"]["source"] == "cache"


async def test_the_commands_list_and_bind(home, start):
    server = await start()
    listed = await command(server, "midfill.adapter.list")
    assert [(one["name"], one["verdict"], one["running"]) for one in listed["adapters"]] == [
        ("one", "none", False),
        ("two", "none", False),
        ("bad", "rejected", False),
    ]
    await command(server, "midfill.adapter.use", "two", "python")
    listed = await command(server, "midfill.adapter.list")
    assert [one["usedIn"] for one in listed["adapters"] if one["running"]] == [["language python"]]
    for arguments, reason in (
        (["none"], "no adapter 'none'"),
        (["bad"], "verdict 'rejected'"),
        (["bad", "global"], "worse"),
    ):
        assert reason in (await command(server, "midfill.adapter.use", *arguments))["error"]
    for wrong in ([], [1], ["one", 2]):
        params = {"command": "midfill.adapter.use", "arguments": wrong}
        assert (await request(server, "workspace/executeCommand", params))["error"]["code"] == -32602
    await command(server, "midfill.adapter.off", "python")
    assert await answer(server, (home / "a.py").as_uri()) == "0"


async def test_one_that_was_rejected_is_not_used_even_if_it_is_bound(home, start):
    Bindings().bind(digest("bad"))
    server = await start()
    uri = (home / "a.py").as_uri()
    assert await answer(server, uri) == "0"
    await settled(server, uri, "0")
    listed = await command(server, "midfill.adapter.list")
    assert "verdict 'rejected'" in listed["failures"][0]


async def test_another_model_is_noticed(home, start, tmp_path):
    base = write_base(tmp_path / "other", seed=9)
    folder = write_adapter(tmp_path / "foreign", seed=8)
    Bindings().bind(Registry().add(folder, name="foreign", base=base).digest)
    server = await start()
    async with asyncio.timeout(60):
        while not (listed := await command(server, "midfill.adapter.list"))["failures"]:
            pass
    assert "is another model" in listed["failures"][0]
    assert await answer(server, (home / "a.py").as_uri()) == "0"


def asks_for(home, name):
    (home / "project" / ".midfill.toml").write_text(f'adapter = "sha256:{digest(name)}"\n')


async def question(server):
    """What the server asks the user; it may have come already, before another answer."""
    method = "window/showMessageRequest"
    async with asyncio.timeout(60):
        while not (asked := [message for message in server.seen if message.get("method") == method]):
            await server.receive()
    [message] = asked
    return message


async def test_a_workspace_only_asks(home, start):
    """Nothing happens until the user has agreed; the answer is kept."""
    asks_for(home, "one")
    server = await start()
    asked = await question(server)
    assert "asks for your adapter one (not evaluated)" in asked["params"]["message"]
    uri = (home / "project" / "a.py").as_uri()
    assert await answer(server, uri) == "0"
    server.send({"jsonrpc": "2.0", "id": asked["id"], "result": {"title": "Use it"}})
    await settled(server, uri, "1")
    assert Bindings().read().workspaces == {str(home / "project"): digest("one")}


@pytest.mark.parametrize("result", [{"title": "Do not use it"}, None])
async def test_a_workspace_that_is_refused(home, start, result):
    asks_for(home, "one")
    server = await start()
    asked = await question(server)
    server.send({"jsonrpc": "2.0", "id": asked["id"], "result": result})
    assert await answer(server, (home / "project" / "a.py").as_uri()) == "0"
    async with asyncio.timeout(60):
        while bool(Bindings().read().refused) is not (result is not None):
            await server.serves()
    assert Bindings().read().workspaces == {}


@pytest.mark.parametrize("name", ["bad", "none"])
async def test_a_workspace_that_asks_for_what_is_not_to_be_had_is_not_spoken_of(home, start, name):
    text = digest(name) if name != "none" else "0" * 64
    (home / "project" / ".midfill.toml").write_text(f'adapter = "sha256:{text}"\n')
    (home / "project" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    server = await start()
    assert await answer(server, (home / "project" / "a.py").as_uri()) == "0"
    assert not any(message.get("method") == "window/showMessageRequest" for message in server.seen)


def session(*, held_out):
    names = (f"session-{number}" for number in range(1000))
    return next(name for name in names if is_held_out(name) == held_out)


@pytest.mark.parametrize("held_out", [True, False])
async def test_a_session_may_be_without_its_adapter_for_comparison(home, start, monkeypatch, held_out):
    monkeypatch.setenv("MIDFILL_STATE", str(home / "state"))
    monkeypatch.setenv("MIDFILL_SESSION", name := session(held_out=held_out))
    Bindings().bind(digest("one"), workspace=home / "project")
    server = await start(initializationOptions={"adapterHoldout": True})
    uri = (home / "project" / "a.py").as_uri()
    status = {}
    async with asyncio.timeout(60):
        while not (status.get("adapter") or status.get("heldOut")):
            status = (await request(server, "midfill/status", {}))["result"]
    assert (status["adapter"], status["heldOut"]) == ((None, "one") if held_out else ("one", None))
    assert await answer(server, uri) == ("0" if held_out else "1")
    listed = await command(server, "midfill.adapter.list")
    assert listed["heldOut"] == held_out
    assert any(one["running"] for one in listed["adapters"]) != held_out
    server.request("end", "shutdown")
    await server.answer("end")
    server.notify("exit")
    await server.status()
    key = key_of("scripted", "one", held_out=held_out)
    assert list(read_sessions(home / "state" / "feedback.json")[name]) == [key]


async def test_no_session_is_held_out_unless_that_is_set(home, start, monkeypatch):
    monkeypatch.setenv("MIDFILL_STATE", str(home / "state"))
    monkeypatch.setenv("MIDFILL_SESSION", session(held_out=True))
    Bindings().bind(digest("one"), workspace=home / "project")
    server = await start()
    await settled(server, (home / "project" / "a.py").as_uri(), "1")


@pytest.mark.slow
async def test_an_adapter_of_the_teams_engine_is_used_where_it_is_bound(home, script):
    """Theirs is the same as ours, by its digest; one that they have not is said, and takes nothing away."""
    tokens = home / "tokens"
    tokens.write_text("ada 0123456789abcdef-ada\n")
    tokens.chmod(0o600)
    program = [*SERVE_COMMAND[:-1], "engine", "serve", *script(*RULES), "--port", "0", "--tokens", tokens]
    team = await asyncio.create_subprocess_exec(
        *program, "--with-adapter", "one", stdout=asyncio.subprocess.PIPE
    )
    try:
        url = (await team.stdout.readline()).decode().strip()
        env = {"MIDFILL_API_KEY": "0123456789abcdef-ada"}
        Bindings().bind(digest("one"))
        async with await Raw.start("--engine", url, env=env) as server:
            await server.initialize()
            await server.loaded()
            await settled(server, (home / "project" / "a.py").as_uri(), "1")
            Bindings().bind(digest("two"), language="rust")
            async with asyncio.timeout(60):
                while not (listed := await command(server, "midfill.adapter.list"))["failures"]:
                    assert await answer(server, (home / "a.py").as_uri()) == "1"
            assert "does not have the adapter two; start it with --with-adapter two" in listed["failures"][0]
            assert await answer(server, (home / "a.rs").as_uri(), "rust") == "1"
    finally:
        team.kill()
        await team.communicate()
