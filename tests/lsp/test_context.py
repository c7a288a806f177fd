"""Context from other files through the real server: it is there, it is data only, and it holds no secret."""

import asyncio
import os
from pathlib import Path

import psutil
import pytest
from planted import certain, possible
from raw import COMMAND, Raw, descendants

from midfill.completion.answer import Trigger
from midfill.engine.scripted import Script, ScriptedEngine
from midfill.evaluation.fillers import Hole, PipelineFiller
from midfill.lsp.server_filler import ServerFiller
from midfill.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

ON = {"context": ["imports", "open", "repository", "edits"], "contextTokens": 2_000}
SHAPES = "class Rectangle:\n    def __init__(self, width, height):\n        self.size = width * height\n"
MAIN = "from shapes import Rectangle\n\nrectangle = Rectangle(1, 2)\nsize = "
WATCHES = {"workspace": {"didChangeWatchedFiles": {"dynamicRegistration": True}}}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "work"
    root.mkdir()
    (root / "shapes.py").write_text(SHAPES)
    return root


async def start(scripted, root, *rules, settings=ON, capabilities=None, folder=True):
    server = await scripted(*rules, {"text": "plain"}, initialize=False)
    folders = [{"uri": root.as_uri(), "name": "work"}] if folder else None
    await server.initialize(
        workspaceFolders=folders, initializationOptions=settings, capabilities=capabilities or {}
    )
    await server.loaded()
    return server


def open_document(server, uri, text):
    item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})


def change(server, uri, text):
    params = {"textDocument": {"uri": uri, "version": 2}, "contentChanges": [{"text": text}]}
    server.notify("textDocument/didChange", params)


async def ask(server, uri, text):
    line, character = text.count("\n"), len(text) - text.rfind("\n") - 1
    params = {
        "textDocument": {"uri": uri},
        "position": {"line": line, "character": character},
        "context": {"triggerKind": 1},
    }
    server.request("ask", "textDocument/inlineCompletion", params)
    items = (await server.answer("ask"))["result"]["items"]
    return items[0]["insertText"] if items else ""


async def until(server, uri, text, expected):
    """Ask until the answer is as expected: the index is built in the background."""
    async with asyncio.timeout(240):
        while await ask(server, uri, text) != expected:
            await asyncio.sleep(0.05)


async def test_a_file_of_the_workspace_is_in_the_prompt(scripted, root):
    server = await start(scripted, root, {"contains": "def __init__(self, width", "text": "seen"})
    uri = (root / "main.py").as_uri()
    open_document(server, uri, MAIN)
    await until(server, uri, MAIN, "seen")
    server.request("why", "midfill/explain", {"textDocument": {"uri": uri}})
    segments = (await server.answer("why"))["result"]["segments"]
    assert any(segment["source"].startswith("context") and segment["tokens"] for segment in segments)


@pytest.mark.process
async def test_no_file_is_read_without_a_folder_or_with_the_setting_off(scripted, root):
    for settings, folder in ((ON, False), ({"context": []}, True)):
        rule = {"contains": "def __init__(self, width", "text": "seen"}
        server = await start(scripted, root, rule, settings=settings, folder=folder)
        uri = (root / "main.py").as_uri()
        open_document(server, uri, MAIN)
        assert await ask(server, uri, MAIN) == "plain"
        assert psutil.Process(server.pid).children(recursive=True) == []


@pytest.mark.process
async def test_the_indexing_process_is_our_own_and_ends(scripted, root):
    server = await start(scripted, root, {"contains": "def __init__(self, width", "text": "seen"})
    process = psutil.Process(server.pid)
    seen = {tuple(line[1:]) for line in descendants(server.pid).values()}
    uri = (root / "main.py").as_uri()
    open_document(server, uri, MAIN)
    await until(server, uri, MAIN, "seen")
    async with asyncio.timeout(60):
        while process.children(recursive=True):
            await asyncio.sleep(0.05)
    assert seen <= {("-P", "-X", "utf8", "-m", "midfill.completion.context.worker")}


async def test_what_is_typed_into_another_document_is_seen(scripted, root):
    server = await start(scripted, root, {"contains": "def brand_new(", "text": "seen"})
    other, main = (root / "other.py").as_uri(), (root / "main.py").as_uri()
    open_document(server, other, "x = 1\n")
    change(server, other, "def brand_new(value):\n    return value * 2\n")
    text = "from other import brand_new\n\nvalue = brand_new("
    open_document(server, main, text)
    await ask(server, main, text)
    open_document(server, (root / "third.py").as_uri(), "y = 2\n")
    await until(server, main, text, "seen")


async def test_when_the_user_rests_new_context_is_read_ahead(scripted, root, tmp_path):
    log = tmp_path / "log"
    server = await scripted({"text": "plain"}, initialize=False, log=str(log))
    await server.initialize(workspaceFolders=[{"uri": root.as_uri(), "name": "w"}], initializationOptions=ON)
    await server.loaded()
    other, main = (root / "other.py").as_uri(), (root / "main.py").as_uri()
    text = "from other import brand_new\n\nvalue = brand_new("
    open_document(server, main, text)
    open_document(server, other, "")
    async with asyncio.timeout(240):
        number = 0
        while "prewarmed" not in log.read_text():
            number += 1
            change(server, other, f"def brand_new(value_{number}):\n    return value_{number} * 2\n")
            open_document(server, (root / f"third_{number}.py").as_uri(), "y = 2\n")
            # The index takes the change a moment after this.
            await ask(server, main, text)
            await asyncio.sleep(1.2)


async def test_files_that_change_on_disk_are_seen(scripted, root):
    server = await scripted(
        {"contains": "def written_later(", "text": "seen"}, {"text": "plain"}, initialize=False
    )
    await server.initialize(
        workspaceFolders=[{"uri": root.as_uri(), "name": "w"}],
        initializationOptions=ON,
        capabilities=WATCHES,
    )
    while (message := await server.receive()).get("method") != "client/registerCapability":
        pass
    (registration,) = message["params"]["registrations"]
    assert registration["method"] == "workspace/didChangeWatchedFiles"
    patterns = {watcher["globPattern"] for watcher in registration["registerOptions"]["watchers"]}
    assert {"**/*.py", "**/.gitignore", "**/.midfillignore"} <= patterns
    server.send({"jsonrpc": "2.0", "id": message["id"], "result": None})
    await server.loaded()
    text = "from later import written_later\n\nvalue = written_later("
    uri = (root / "main.py").as_uri()
    open_document(server, uri, text)
    assert await ask(server, uri, text) == "plain"
    (root / "later.py").write_text("def written_later(value):\n    return value * 2\n")
    changed = {"changes": [{"uri": (root / "later.py").as_uri(), "type": 1}]}
    for junk in (None, {"changes": 5}, {"changes": [{"uri": 5}]}, {"changes": [{"uri": "file:", "type": 9}]}):
        server.notify("workspace/didChangeWatchedFiles", junk)
    server.notify("workspace/didChangeWatchedFiles", changed)
    # Another document makes this one's context be chosen anew.
    async with asyncio.timeout(60):
        number = 0
        while await ask(server, uri, text) != "seen":
            number += 1
            open_document(server, (root / f"third_{number}.py").as_uri(), "y = 2\n")
            await asyncio.sleep(0.05)


async def test_nothing_in_a_workspace_blocks_an_answer_while_it_is_indexed(scripted, root):
    os.mkfifo(root / "pipe.py")
    os.mkfifo(root / ".gitignore")
    (root / "loop").symlink_to(root)
    (root / "etc").symlink_to("/etc")
    with (root / "huge.py").open("wb") as file:
        file.truncate(1 << 40)
    for number in range(400):
        (root / f"file_{number}.py").write_text(f"def f_{number}(a):\n    return a + {number}\n" * 40)
    rule = {"contains": "def __init__(self, width", "text": "seen"}
    server = await start(scripted, root, rule)
    uri = (root / "main.py").as_uri()
    open_document(server, uri, MAIN)
    # What blocks here blocks for good: `ask` gives up after a while.
    await ask(server, uri, MAIN)
    await until(server, uri, MAIN, "seen")


async def test_the_server_ends_while_it_indexes(script, root):
    for number in range(2_000):
        (root / f"file_{number}.py").write_text(f"def f_{number}(a):\n    return a + {number}\n" * 40)
    async with await Raw.start(*script({"text": "1"}), command=COMMAND) as server:
        await server.initialize(
            workspaceFolders=[{"uri": root.as_uri(), "name": "w"}], initializationOptions=ON
        )
        await server.loaded()
        children = psutil.Process(server.pid).children(recursive=True)
        server.request("bye", "shutdown")
        await server.answer("bye")
        server.notify("exit")
        assert await server.status() == 0
    assert children
    assert psutil.wait_procs(children, timeout=60)[1] == []


async def test_an_evaluation_sees_what_an_editor_would(script, root):
    (_, engine) = script({"contains": "def __init__(self, width", "text": "seen"}, {"text": "plain"})
    hole = Hole((root / "main.py").as_uri(), "python", MAIN, "\n")
    options = {"context": ["imports"], "eagerness": "always"}
    for folder, expected in ((root, "seen"), (None, "plain")):
        filler = await ServerFiller.start(options, "scripted", lambda *_: None, engine, folder)
        try:
            assert (await filler.fill(hole, Trigger.INVOKED)).text == expected
        finally:
            await filler.close()
    model = ScriptedEngine(Script.read(Path(engine.removeprefix("scripted:"))))
    await model.start(lambda *_: None)
    filler = PipelineFiller(model, Settings(context=("imports",), eagerness="always"))
    await filler.open_folder(root)
    assert (await filler.fill(hole, Trigger.INVOKED)).text == "seen"
    filler.close()


@pytest.mark.slow
async def test_a_planted_secret_is_in_none_of_a_thousand_suggestions(scripted, root):
    """The script answers "leaked" to every prompt in which it finds one, and "seen" to one with context."""
    kinds = certain() | possible()
    lines = [line for line, _ in kinds.values()]
    for number, line in enumerate(lines):
        text = f"def connect_{number}(client):\n    return client.open_session({number})\n\n\n"
        (root / f"service_{number}.py").write_text(
            text + f"class Client_{number}:\n    def login(self):\n    {line}\n"
        )
        (root / f"clean_{number}.py").write_text(text.replace("connect_", "clean_connect_"))
    (root / ".env").write_text("\n".join(lines))
    rules = [{"contains": secret, "text": "leaked"} for _, secret in kinds.values()]
    server = await start(scripted, root, *rules, {"contains": "return client.open_session(", "text": "seen"})
    uri = (root / "main.py").as_uri()
    text = "from clean_0 import clean_connect_0\n\nsession = client.open_session("
    open_document(server, uri, text)
    await until(server, uri, text, "seen")
    answers = []
    for count in range(1_000):
        number = count % len(lines)
        other = (root / f"other_{number}.py").as_uri()
        if count < len(lines):
            open_document(server, other, "x = 1\n")
        if count % 3 == 0:
            change(server, other, f"x = {count}\n{lines[number]}\ny = open_session({count})\n")
        text = f"from service_{number} import Client_{number}, connect_{number}\n\n\n"
        text += f"client = Client_{number}()\nsession_{count} = client.open_session("
        change(server, uri, text)
        answers.append(await ask(server, uri, text))
    assert "leaked" not in answers
    assert answers.count("seen") > 900
