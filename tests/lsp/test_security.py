"""What the server never does: listen, connect, import or write here, repeat your text in a log."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from planted import certain
from raw import COMMAND, Raw

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "hunter2-the-secret"
CONSOLE_SCRIPT = [str(Path(sys.executable).with_name("midfill")), "serve"]
SENTINELS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>", "<|file_sep|>"]


def open_document(server, text, uri):
    item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})


async def ask(server, line, character, uri):
    params = {
        "textDocument": {"uri": uri},
        "position": {"line": line, "character": character},
        "context": {"triggerKind": 1},
    }
    server.request("ask", "textDocument/inlineCompletion", params)
    return (await server.answer("ask"))["result"]["items"]


async def session(server, root):
    """A short session that touches everything."""
    await server.loaded()
    uri = (root / "main.py").as_uri()
    open_document(server, f"password = '{SECRET}'\nx = \n", uri)
    await ask(server, 1, 4, uri)
    open_document(server, f"TOKEN={SECRET}\n", (root / ".env").as_uri())
    await ask(server, 0, 3, (root / ".env").as_uri())
    for change in ({"text": SECRET}, {"text": 5}, {"range": SECRET, "text": SECRET}):
        params = {"textDocument": {"uri": uri, "version": 2}, "contentChanges": [change]}
        server.notify("textDocument/didChange", params)
    server.notify("textDocument/didChange", {"textDocument": SECRET, "contentChanges": SECRET})
    server.notify(
        "workspace/didChangeWorkspaceFolders",
        {"event": {"added": [], "removed": [{"uri": SECRET, "name": SECRET}]}},
    )
    server.request("bad", "textDocument/completion", {"textDocument": SECRET})
    await server.answer("bad")
    server.send(f'{{"jsonrpc": "2.0", "{SECRET}'.encode())
    await server.serves()


@pytest.mark.parametrize("command", [CONSOLE_SCRIPT, COMMAND], ids=["midfill serve", "python -P -m midfill"])
async def test_modules_in_the_working_directory_are_never_imported(script, tmp_path, command):
    root = tmp_path / "cloned"
    root.mkdir()
    for name in ("json", "torch", "pygls", "midfill", "asyncio", "sitecustomize", "psutil", "transformers"):
        (root / f"{name}.py").write_text(
            "import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n"
        )
    async with await Raw.start(*script({"text": "1"}), command=command, cwd=root) as server:
        await server.initialize(rootUri=root.as_uri())
        await session(server, root)
    assert not list(root.glob("*.ran"))


async def test_nothing_is_written_into_the_workspace(script, tmp_path):
    root = tmp_path / "work"
    root.mkdir()
    (root / "main.py").write_text("x = \n")
    before = {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}
    async with await Raw.start(*script({"text": "1"}), command=COMMAND, cwd=root) as server:
        await server.initialize(rootUri=root.as_uri(), workspaceFolders=[{"uri": root.as_uri(), "name": "w"}])
        await session(server, root)
        server.process.stdin.close()
        await server.status()
    assert {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]} == before


@pytest.mark.process
async def test_it_neither_listens_nor_connects(scripted, tmp_path):
    server = await scripted({"text": "1"})
    await session(server, tmp_path)
    process = psutil.Process(server.pid)
    assert [c for p in [process, *process.children(recursive=True)] for c in p.net_connections("inet")] == []
    sockets = [c for c in process.net_connections("unix") if c.laddr]
    assert sockets == []


@pytest.mark.parametrize("to_file", [False, True], ids=["stderr", "log file"])
async def test_neither_text_nor_environment_is_ever_logged(script, tmp_path, to_file):
    log = tmp_path / "midfill.log"
    arguments = [*script({"after": "x = ", "crash": True}, {"text": "1"}), "--log-level", "debug"]
    arguments += ["--log-file", str(log)] if to_file else []
    async with await Raw.start(*arguments, env={"API_KEY": SECRET, "PYTHONASYNCIODEBUG": "1"}) as server:
        await server.initialize(clientInfo={"name": SECRET})
        await session(server, tmp_path)
        server.request("bye", "shutdown")
        await server.answer("bye")
        server.notify("exit")
        await server.status()
        logged = (await server.process.stderr.read()).decode()
    logged += log.read_text() if to_file else ""
    assert "midfill" in logged
    assert SECRET not in logged


async def test_a_message_that_breaks_the_server_is_not_logged(script):
    """Whatever fails outside a handler is reported by kind and place, not with its arguments."""
    code = (
        "import midfill.lsp.protocol as p, midfill.cli.main as c, sys\n"
        "def receive(self, body): raise RuntimeError(body)\n"
        "p.Protocol.receive = receive\n"
        f"sys.argv = ['midfill', 'serve', *{script()!r}]\n"
        "c.main()\n"
    )
    async with await Raw.start(command=[sys.executable, "-P", "-c", code]) as server:
        server.send({"jsonrpc": "2.0", "method": SECRET})
        server.process.stdin.close()
        await server.status()
        logged = (await server.process.stderr.read()).decode()
    assert "RuntimeError" in logged
    assert SECRET not in logged


@pytest.mark.parametrize("name", [".env", ".env.local", "server.pem", "id_rsa", ".ENV", "a.key"])
async def test_files_that_hold_secrets_never_reach_the_model(shared, name):
    await shared.loaded()
    num_before = len(shared.engine_log.read_text().splitlines())
    for uri in (
        f"file:///work/{name}",
        f"untitled:{name}",
        f"git:/work/{name}?x",
        f"vscode-notebook-cell:/work/{name}#1",
    ):
        open_document(shared, "KEY=", uri)
        assert await ask(shared, 0, 4, uri) == []
    assert len(shared.engine_log.read_text().splitlines()) == num_before


async def test_a_secret_typed_into_a_file_ends_its_suggestions(scripted, tmp_path):
    log = tmp_path / "log"
    server = await scripted({"text": "1"}, log=str(log))
    await server.loaded()
    uri = "file:///work/main.py"
    open_document(server, "a = \n", uri)
    assert len(await ask(server, 0, 4, uri)) == 1
    num_before = len(log.read_text().splitlines())
    line, _ = certain()["GitHub token"]
    change = {
        "range": {"start": {"line": 1, "character": 0}, "end": {"line": 1, "character": 0}},
        "text": line,
    }
    server.notify(
        "textDocument/didChange",
        {"textDocument": {"uri": uri, "version": 2}, "contentChanges": [change]},
    )
    assert await ask(server, 0, 4, uri) == []
    server.request("why", "midfill/explain", {"textDocument": {"uri": uri}})
    assert (await server.answer("why"))["result"]["reason"] == "secret-in-file"
    assert len(log.read_text().splitlines()) == num_before


@pytest.mark.parametrize("sentinel", SENTINELS)
async def test_sentinels_in_a_file_do_not_act_as_sentinels(shares, sentinel):
    server = await shares(*({"after": f"{one} a =", "text": " 1"} for one in SENTINELS))
    await server.loaded()
    uri = "file:///work/main.py"
    text = f"b = '{sentinel}'\n{sentinel} a =\n"
    open_document(server, text, uri)
    (item,) = await ask(server, 1, len(sentinel) + 4, uri)
    assert item["insertText"] == " 1"
    # Every character is a token of its own here, so a sentinel that acted would be one, not many.
    server.request("why", "midfill/explain", {"textDocument": {"uri": uri}})
    explained = (await server.answer("why"))["result"]
    assert explained["promptTokens"] >= len(text)
    names = [segment["source"] for segment in explained["segments"]]
    assert [names.count(name) for name in SENTINELS[:3]] == [1, 1, 1]


@pytest.mark.parametrize("sentinel", SENTINELS[:3])
async def test_sentinels_never_come_back_in_a_suggestion(scripted, sentinel):
    server = await scripted({"text": f"1 + {sentinel}2"})
    await server.loaded()
    uri = "file:///work/main.py"
    open_document(server, "a = \n", uri)
    assert sentinel not in json.dumps(await ask(server, 0, 4, uri))


async def asked_when_loaded(server, method, place):
    async with asyncio.timeout(60):
        while not any(m == "$/progress" and p["value"]["kind"] == "end" for m, p in server.heard):
            await server.request("midfill/explain", {"textDocument": place["textDocument"]})
    return await server.request(method, place | {"context": {"triggerKind": 1}})


@pytest.mark.parametrize(
    "unsafe", ["\x1b[31m", "\x08\x08", "\x9b2J", "\u202e", "\u2066", "\u200b", "\U000e0041"]
)
async def test_characters_that_hide_or_command_reach_no_editor_and_no_log(client, tmp_path, unsafe):
    log = tmp_path / "midfill.log"
    text = f"return a + b{unsafe}  # x\n    return a\n"
    server = await client({"text": text}, arguments=["--log-file", str(log), "--log-level", "debug"])
    uri = "file:///work/main.py"
    item = {"uri": uri, "languageId": "python", "version": 1, "text": "def add(a, b):\n    \n"}
    server.notify("textDocument/didOpen", {"textDocument": item})
    place = {"textDocument": {"uri": uri}, "position": {"line": 1, "character": 4}}
    answers = [
        await asked_when_loaded(server, "textDocument/inlineCompletion", place),
        await server.request("textDocument/completion", place | {"context": {"triggerKind": 1}}),
        await server.request("midfill/explain", {"textDocument": {"uri": uri}, "text": True}),
    ]
    assert answers[0]["items"][0]["insertText"] == "return a + b"
    shown = json.dumps(answers, ensure_ascii=False) + log.read_text()
    assert not set(unsafe) - set("[31m2J") & set(shown)
    assert json.dumps(unsafe[0])[1:-1] not in shown


async def test_files_of_the_workspace_choose_nothing(script, tmp_path):
    """Settings, models and adapters that lie in a cloned folder have no effect."""
    root = tmp_path / "cloned"
    (root / ".vscode").mkdir(parents=True)
    evil = {"midfill": {"model": "evil", "adapter": "./evil"}, "model": "evil", "enabled": False}
    (root / ".vscode" / "settings.json").write_text(json.dumps(evil))
    (root / "config.toml").write_text('model = "evil"\nenabled = false\n')
    (root / "midfill.toml").write_text('model = "evil"\nenabled = false\n')
    (root / ".midfill.toml").write_text('model = "evil"\nenabled = false\n')
    (root / "pyproject.toml").write_text('[tool.midfill]\nmodel = "evil"\nenabled = false\n')
    (root / ".env").write_text("MIDFILL_CONFIG=config.toml\n")
    config = tmp_path / "home"
    config.mkdir()
    environment = {"HOME": str(config), "XDG_CONFIG_HOME": str(config)}
    async with await Raw.start(*script({"text": "1"}), command=COMMAND, cwd=root, env=environment) as server:
        await server.initialize(rootUri=root.as_uri())
        await server.loaded()
        uri = (root / "main.py").as_uri()
        open_document(server, "a = \n", uri)
        assert len(await ask(server, 0, 4, uri)) == 1
        assert "evil" not in json.dumps(server.seen)


async def test_a_running_server_keeps_its_model(scripted):
    server = await scripted({"text": "1"})
    await server.loaded()
    server.notify(
        "workspace/didChangeConfiguration",
        {"settings": {"midfill": {"model": "other", "device": "auto", "maxNewTokens": 8}}},
    )
    message = await server.receive()
    # Only what differs is spoken of.
    assert message["params"]["message"] == "midfill: Setting 'model': restart the server to change it."
    server.notify("workspace/didChangeConfiguration", {"settings": {"midfill": {"device": "auto"}}})
    await server.serves()
    assert server.seen[-2] == message


@pytest.mark.process
async def test_the_server_starts_no_program(scripted, tmp_path):
    server = await scripted({"text": "1"})
    await session(server, tmp_path)
    assert psutil.Process(server.pid).children(recursive=True) == []


async def test_its_files_are_not_handed_to_children(script):
    """A child that a library starts must not hold our pipes open: the editor would wait for it."""
    if not shutil.which("true") or not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    async with await Raw.start(*script(), command=COMMAND) as server:
        await server.initialize()
        inheritable = []
        for path in Path(f"/proc/{server.pid}/fdinfo").iterdir():
            flags = next(line for line in path.read_text().splitlines() if line.startswith("flags"))
            if int(path.name) > 2 and not int(flags.split()[1], 8) & os.O_CLOEXEC:
                inheritable.append(path.name)
        assert inheritable == []


async def test_standard_output_carries_nothing_but_frames(script, tmp_path):
    """What a library prints goes to stderr."""
    code = (
        "import sys, os, midfill.lsp.handlers.initialized as h, midfill.cli.main as c\n"
        "old = h.load_model\n"
        "def load_model(session):\n"
        "    print('noise'); os.system('echo noise'); os.write(1, b'noise'); return old(session)\n"
        "h.load_model = load_model\n"
        f"sys.argv = ['midfill', 'serve', *{script()!r}]\n"
        "c.main()\n"
    )
    async with await Raw.start(command=[sys.executable, "-P", "-c", code]) as server:
        await server.initialize()
        await server.loaded()
        await server.serves()
        server.process.stdin.close()
        await server.status()
        async with asyncio.timeout(60):
            assert (await server.process.stderr.read()).count(b"noise") >= 2
