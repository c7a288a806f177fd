"""Folders, files and settings of any shape: none blocks an answer, none changes what it must not."""

import os

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")


def ask(server, id_, uri, character=4):
    params = {
        "textDocument": {"uri": uri},
        "position": {"line": 0, "character": character},
        "context": {"triggerKind": 2},
    }
    server.request(id_, "textDocument/inlineCompletion", params)


def open_document(server, text, uri):
    item = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    server.notify("textDocument/didOpen", {"textDocument": item})


@pytest.fixture
def hostile(tmp_path):
    """A workspace that hangs or breaks whoever reads it carelessly."""
    root = tmp_path / "hostile"
    (root / "deep").mkdir(parents=True)
    os.mkfifo(root / "pipe.py")
    os.mkfifo(root / "config.toml")
    (root / "loop").symlink_to(root)
    (root / "self.py").symlink_to(root / "self.py")
    (root / "deep" / "up").symlink_to(root / "deep")
    (root / "secret.py").write_text("x")
    (root / "secret.py").chmod(0)
    (root / "no_entry").mkdir(mode=0)
    with (root / "huge.py").open("wb") as file:
        file.truncate(1 << 40)
    (root / os.fsdecode(b"\xff\xfe.py")).write_text("x")
    yield root
    (root / "no_entry").chmod(0o700)


async def test_nothing_in_a_workspace_blocks_an_answer(scripted, hostile):
    server = await scripted({"text": "1"}, initialize=False)
    folders = [
        {"uri": hostile.as_uri(), "name": "hostile"},
        {"uri": (hostile / "pipe.py").as_uri(), "name": "pipe"},
    ]
    # What blocks here blocks for good: each answer is given up after a while.
    await server.initialize(rootUri=hostile.as_uri(), rootPath=str(hostile), workspaceFolders=folders)
    await server.loaded()
    for name in (
        "pipe.py",
        "self.py",
        "secret.py",
        "huge.py",
        "loop/loop/loop/pipe.py",
        "no_entry/x.py",
        "%FF%FE.py",
    ):
        uri = f"{hostile.as_uri()}/{name}"
        ask(server, f"closed {name}", uri)
        assert (await server.answer(f"closed {name}"))["result"]["items"] == []
        open_document(server, "a = \n", uri)
        ask(server, name, uri)
        assert len((await server.answer(name))["result"]["items"]) == 1


async def test_folders_come_and_go(shared):
    folder = {"uri": "file:///work", "name": "work"}
    for event in (
        {"added": [folder], "removed": []},
        {"added": [folder, folder], "removed": [folder]},
        {"added": [], "removed": [folder]},
        {"added": [], "removed": [folder, {"uri": "file:///never/there", "name": ""}]},
        {
            "added": [
                {"uri": "untitled:", "name": ""},
                {"uri": "file:///c%3A/x y", "name": "w"},
                {"uri": "", "name": ""},
            ],
            "removed": [],
        },
        {"added": None, "removed": None},
        None,
    ):
        shared.notify("workspace/didChangeWorkspaceFolders", {"event": event})
        await shared.serves()


@pytest.mark.parametrize(
    ("root", "folders"),
    [
        (None, None),
        ("file:///gone", []),
        ("untitled:", None),
        ("", [{"uri": "", "name": ""}]),
        (7, 7),
        ("file:///a%", "x"),
        (None, [None]),
    ],
    ids=str,
)
async def test_odd_roots(scripted, root, folders):
    server = await scripted(initialize=False)
    await server.initialize(rootUri=root, workspaceFolders=folders)
    await server.serves()


JUNK = [
    (7, "object"),
    ("text", "object"),
    ([1, 2], "object"),
    (True, "object"),
    ({"maxNewTokens": "many"}, "maxNewTokens"),
    ({"maxNewTokens": 10**400}, "maxNewTokens"),
    ({"maxNewTokens": -1}, "maxNewTokens"),
    ({"maxNewTokens": 8.5}, "maxNewTokens"),
    ({"maxNewTokens": {"a": [[[]]]}}, "maxNewTokens"),
    ({"disabledLanguages": "python"}, "disabledLanguages"),
    ({"disabledLanguages": [7]}, "disabledLanguages"),
    ({"excludedFiles": {}}, "excludedFiles"),
    ({"deadlineS": float("nan")}, "deadlineS"),
    ({"deadlineS": float("inf")}, "deadlineS"),
    ({"": 1}, "''"),
    ({"__class__": 1}, "__class__"),
    ({"model_config": {}}, "model_config"),
    ({"midfill": {"nonsense": 1}}, "nonsense"),
    ({"nested": {"a": {"b": {"c": 1}}}}, "nested"),
]


@pytest.mark.parametrize(("values", "named"), JUNK, ids=lambda value: str(value)[:40])
async def test_junk_in_the_configuration_keeps_the_old_settings_and_is_named(shared, values, named):
    shared.notify("workspace/didChangeConfiguration", {"settings": values})
    message = await shared.receive()
    assert message["method"] == "window/showMessage"
    assert named in message["params"]["message"]
    open_document(shared, "a = \n", "file:///junk.py")
    ask(shared, 1, "file:///junk.py")
    assert len((await shared.answer(1))["result"]["items"]) == 1


async def test_junk_at_the_start_is_named_and_the_good_settings_count(scripted):
    server = await scripted({"text": "1"}, initialize=False)
    values = {"maxNewTokens": "many", "nonsense": 1, "disabledLanguages": ["python"], "deadlineS": []}
    await server.initialize(initializationOptions=values)
    await server.loaded()
    (message,) = [
        message["params"]["message"]
        for message in server.seen
        if message.get("method") == "window/showMessage"
    ]
    assert all(name in message for name in ("maxNewTokens", "nonsense", "deadlineS"))
    assert "disabledLanguages" not in message
    open_document(server, "a = \n", "file:///x.py")
    ask(server, 1, "file:///x.py")
    await server.answer(1)
    server.request(2, "midfill/explain", {"textDocument": {"uri": "file:///x.py"}})
    assert (await server.answer(2))["result"]["reason"] == "language-off"


@pytest.mark.parametrize(
    "options", [7, "x", [], [{}], True, {"a": {}}, {"midfill": 5}, {"midfill": None}], ids=str
)
async def test_strange_initialization_options_do_not_lock_the_editor_out(scripted, options):
    server = await scripted(initialize=False)
    await server.initialize(initializationOptions=options)
    await server.serves()
