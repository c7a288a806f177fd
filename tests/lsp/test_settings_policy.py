"""Who may set which setting, with the real process: every key, by every way that leads to it."""

import json
from pathlib import Path

import pytest
import tomlkit
from planted_settings import EDITOR, FILE, KEYS, PROJECT, RESTART, changed
from pydantic.alias_generators import to_camel
from raw import Raw

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALL = {key: changed(key) for key in KEYS}


async def changed_settings(server):
    server.request("status", "midfill/status")
    return set((await server.answer("status"))["result"]["changedSettings"])


def warned(server, text):
    """The keys that a message of the server names with such words."""
    said = [
        message["params"]["message"]
        for message in server.seen
        if message.get("method") == "window/showMessage"
    ]
    return {
        key
        for key in KEYS
        for one in said
        if any(f"Setting {spelled!r}{text}" in one for spelled in (key, to_camel(key)))
    }


@pytest.fixture
def start(script, tmp_path):
    """Start a server whose settings file has these keys."""

    async def begin(**values):
        config = tmp_path / "own" / "config.toml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(tomlkit.dumps(values))
        return await Raw.start(*script(), env={"MIDFILL_CONFIG": str(config)}, cwd=tmp_path)

    return begin


@pytest.mark.parametrize("spell", [str, to_camel], ids=["snake", "camel"])
@pytest.mark.parametrize("nested", [False, True])
async def test_what_an_editor_may_send_at_the_start(start, spell, nested):
    values = {spell(key): value for key, value in ALL.items()}
    async with await start() as server:
        await server.initialize(initializationOptions={"midfill": values} if nested else values)
        assert await changed_settings(server) == EDITOR | PROJECT
        assert warned(server, " is taken from") == FILE


@pytest.mark.parametrize("spell", [str, to_camel], ids=["snake", "camel"])
async def test_what_an_editor_may_send_while_the_server_runs(start, spell):
    values = {spell(key): value for key, value in ALL.items()}
    async with await start() as server:
        await server.initialize()
        server.notify("workspace/didChangeConfiguration", {"settings": {"midfill": values}})
        assert await changed_settings(server) == (EDITOR | PROJECT) - RESTART
        assert warned(server, " is taken from") == FILE
        assert warned(server, ": restart") == RESTART - FILE


@pytest.mark.parametrize("key", sorted(FILE))
async def test_what_the_file_alone_sets_is_kept_whatever_an_editor_sends(start, key):
    values = {key: ALL[key]}
    if key == "engine":
        # Nothing is asked at this address: `--engine` names the scripted model.
        values[key] = "http://127.0.0.1:9"
    async with await start(**values) as server:
        await server.initialize(initializationOptions={key: None, to_camel(key): ALL[key]})
        server.notify("workspace/didChangeConfiguration", {"settings": {"midfill": {key: None}}})
        assert await changed_settings(server) == {key}


async def test_no_file_of_a_workspace_sets_anything(start, tmp_path):
    """Whatever it is called, and though the server is started in it."""
    toml, camel = tomlkit.dumps(ALL), {f"midfill.{to_camel(key)}": value for key, value in ALL.items()}
    lines = "".join(f"MIDFILL_{key.upper()}={value}\n" for key, value in ALL.items())
    texts = {
        **dict.fromkeys(
            (".midfill.toml", "midfill.toml", "config.toml", ".config/midfill/config.toml"), toml
        ),
        "pyproject.toml": tomlkit.dumps({"tool": {"midfill": ALL}}),
        ".vscode/settings.json": json.dumps(camel | ALL),
        ".env": lines,
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    folder = {"uri": tmp_path.as_uri(), "name": "hostile"}
    async with await start() as server:
        await server.initialize(rootUri=folder["uri"], workspaceFolders=[folder])
        await server.loaded()
        assert await changed_settings(server) == set()
        assert not any(message.get("method") == "window/showMessage" for message in server.seen)


async def test_a_project_sets_in_vs_code_only_what_is_declared_for_it():
    """VS Code itself keeps a workspace's settings from keys of the scope "machine"."""
    client = Path(__file__).parents[2] / "clients" / "vscode"
    manifest = json.loads((client / "package.json").read_text(encoding="utf-8"))
    declared = manifest["contributes"]["configuration"][1]["properties"]
    by_scope = {
        scope: {key.removeprefix("midfill.") for key, value in declared.items() if value["scope"] == scope}
        for scope in ("window", "machine")
    }
    assert by_scope == {"window": set(map(to_camel, PROJECT)), "machine": set(map(to_camel, EDITOR))}


@pytest.mark.parametrize(
    ("setting", "sent"),
    [
        ("sh", "shellscript"),  # Neovim's word in the file, VS Code's from the editor
        ("shellscript", "bash-ts"),
        ("Shell Script", "sh"),
        ("c++", "cpp"),
        ("js", "javascript"),
        ("tex", "latex"),
        ("yml", "yaml.ansible"),
        ("plaintext", "text"),
        ("conf", "conf"),
    ],
)
async def test_a_language_is_switched_off_in_whatever_words(start, setting, sent):
    async with await start(disabled_languages=[setting]) as server:
        await server.initialize()
        await server.loaded()
        for uri, language in (("file:///w/a", sent), ("file:///w/b", "rust")):
            item = {"uri": uri, "languageId": language, "version": 1, "text": "x = "}
            server.notify("textDocument/didOpen", {"textDocument": item})
            here = {"textDocument": {"uri": uri}, "position": {"line": 0, "character": 4}}
            server.request(1, "textDocument/inlineCompletion", here | {"context": {"triggerKind": 1}})
            await server.answer(1)
            server.request(2, "midfill/explain", {"textDocument": {"uri": uri}})
            reason = (await server.answer(2))["result"]["reason"]
            assert (reason == "language-off") == (language == sent)
